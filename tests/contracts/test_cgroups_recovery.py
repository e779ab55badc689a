"""The cgroups leaf over crashes and restarts: a cgroup is fully there or fully gone, and no live one is touched."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cgroups import eventually, inside, sleep
from support.cgroups_leaf import MIB, Leaf, connected
from support.corrald import Corrald
from support.requirements import needs

from corral.kernel.cgroup import Cgroup, detect, open_driver
from corral.kernel.mount import MNT_DETACH, mount, umount
from corral.rpc.errors import (
    CorralError,
    ResourceExhausted,
)

pytestmark = needs("root", "cgroup")


@pytest.fixture
def own() -> Iterator[Corrald]:
    """A daemon that the test may kill."""
    with Corrald(services=("cgroups",)) as corrald:
        yield corrald


async def test_a_restart_keeps_the_cgroup_of_a_running_process_and_still_sees_its_oom(own: Corrald) -> None:
    own.start()
    async with connected(own) as leaf:
        made = await leaf.create("kept")

        def body(say: int) -> None:
            signal.signal(signal.SIGUSR1, lambda *_: bytearray(128 * MIB))
            os.write(say, b"r")
            signal.pause()

        with inside(leaf.kernel("kept"), body) as child:
            assert child.hear() == b"r"
            own.kill9()
            own.start()
            assert child.alive()
            assert await leaf.get("kept") == made
            os.kill(child.pid, signal.SIGUSR1)
            assert os.WTERMSIG(child.wait()) == signal.SIGKILL
        await leaf.oom("kept")
        await leaf.delete("kept")


async def test_kills_in_a_sub_cgroup_that_is_gone_stay_counted_also_after_a_restart(own: Corrald) -> None:
    own.start()
    async with connected(own) as leaf:
        await leaf.create("counted")
        nested = open_driver(detect()).create(f"{leaf.kernel('counted').path}/nested")

        async def is_told(kills: int) -> None:
            for _ in range(250):
                if (await leaf.get("counted")).oom_kills == kills:
                    break
                await asyncio.sleep(0.02)
            assert (await leaf.get("counted")).oom_kills == kills
            [reading] = await leaf.stats("counted")
            assert reading.memory.oom_kills == kills

        def hog(group: Cgroup) -> None:
            with inside(group, lambda _: bytearray(128 * MIB)) as child:
                assert os.WTERMSIG(child.wait()) == signal.SIGKILL

        hog(nested)
        await is_told(1)
        nested.remove()
        await is_told(1)
        own.kill9()
        own.start()
        await is_told(1)
        hog(open_driver(detect()).create(f"{leaf.kernel('counted').path}/other"))
        await is_told(2)
        await leaf.delete("counted")


async def test_a_cgroup_without_a_row_is_removed_at_the_start_with_what_is_inside(own: Corrald) -> None:
    own.start()
    async with connected(own) as leaf:
        await leaf.create("known")
        own.kill9()
        stray = open_driver(detect()).create(f"{leaf.kernel('stray').path}/nested")
        with inside(stray, sleep) as child:
            own.start()
            assert os.WTERMSIG(child.wait()) == signal.SIGKILL
        assert not leaf.kernel("stray").exists()
        assert await leaf.names() == ["known"]
        await leaf.delete("known")


async def test_a_row_without_a_cgroup_is_deleted_at_the_start_with_an_event(own: Corrald) -> None:
    own.start()
    async with connected(own) as leaf:
        await leaf.create("lost")
        own.kill9()
        leaf.kernel("lost").remove()
        own.start()
        assert await leaf.names() == []
        assert await leaf.topics("lost") == ["cgroup.created", "cgroup.removed"]


@pytest.mark.parametrize("parent", ["", "x"])
@pytest.mark.parametrize(
    "point", ["cgroups.create.after_announce", "cgroups.create.after_make", "cgroups.delete.after_remove"]
)
async def test_a_crash_leaves_a_cgroup_fully_there_or_fully_gone(own: Corrald, point: str, parent: str) -> None:
    chosen = f"{own.place.cgroup_parent}{parent}" if parent else ""
    if not chosen and point == "cgroups.create.after_announce":
        return
    own.start(environment={"CORRAL_FAILPOINTS": f"{point}=kill"})
    async with connected(own) as leaf:
        path = f"{chosen}/crash" if chosen else leaf.kernel("crash").path
        with pytest.raises(CorralError):
            await make_and_delete(leaf, "crash", chosen)
        assert eventually(lambda: own.processes["corrald"].poll() is not None)
        own.start()
        assert await leaf.names() == []
        assert not open_driver(detect()).open(path).exists()
        await make_and_delete(leaf, "crash", chosen)
    if chosen:
        open_driver(detect()).prune(chosen)


async def test_who_deletes_a_cgroup_is_told_before_its_row_is_deleted_and_a_crash_between_loses_nothing(
    own: Corrald,
) -> None:
    own.start(environment={"CORRAL_FAILPOINTS": "cgroups.delete.before_row=kill"})
    async with connected(own) as leaf:
        await make_and_delete(leaf, "told", "")
        assert eventually(lambda: own.processes["corrald"].poll() is not None)
        own.start()
        assert await leaf.names() == []
        assert await leaf.topics("told") == ["cgroup.created", "cgroup.removed"]
        await make_and_delete(leaf, "told", "")


async def test_who_deletes_a_cgroup_below_another_parent_is_told_once_its_row_is_deleted(own: Corrald) -> None:
    chosen = f"{own.place.cgroup_parent}x"
    own.start(environment={"CORRAL_FAILPOINTS": "cgroups.delete.before_row=kill"})
    try:
        async with connected(own) as leaf:
            await leaf.create("elsewhere", parent=chosen)
            with pytest.raises(CorralError):
                await leaf.delete("elsewhere")
            assert eventually(lambda: own.processes["corrald"].poll() is not None)
            own.start()
            assert await leaf.names() == []
    finally:
        open_driver(detect()).prune(chosen)


@needs("mount")
async def test_a_cgroup_whose_row_a_full_disk_refuses_is_gone_when_its_maker_is_told(own: Corrald) -> None:
    disk = own.root / "cgroups"
    disk.mkdir(parents=True)
    mount(Path("corral-test"), disk, "tmpfs", 0, "size=1m")
    try:
        own.start()
        async with connected(own) as leaf:
            with (disk / "junk").open("wb", buffering=0) as junk, pytest.raises(OSError, match="No space left"):
                junk.writelines(iter(lambda: b"x" * 4096, b""))
            refused = await first_refused(leaf)
            assert not leaf.kernel(refused).exists()
            (disk / "junk").unlink()
            await leaf.create(refused)
            for name in await leaf.names():
                await leaf.delete(name)
        own.stop()
    finally:
        umount(disk, MNT_DETACH)


async def first_refused(leaf: Leaf) -> str:
    """By a full disk: the database has kept room for some."""
    for number in range(2000):
        try:
            await leaf.create(f"c{number}")
        except ResourceExhausted:
            return f"c{number}"
    raise AssertionError("the disk is not full")


async def make_and_delete(leaf: Leaf, name: str, parent: str) -> None:
    await leaf.create(name, parent=parent)
    await leaf.delete(name)


def test_a_second_engine_on_the_same_parent_does_not_start_while_the_first_has_cgroups(own: Corrald) -> None:
    own.start()
    driver = open_driver(detect())
    group = driver.create(f"{own.place.cgroup_parent}/default/mine")
    with Corrald(services=("cgroups",), settings={"cgroups": {"parent": own.place.cgroup_parent}}) as other:
        with pytest.raises(RuntimeError, match=str(own.root / "cgroups")):
            other.start()
        assert group.exists()
        group.remove()


def test_a_stop_leaves_no_empty_parents(own: Corrald) -> None:
    own.start()
    assert any(Path(h.mount_point + own.place.cgroup_parent).exists() for h in detect().hierarchies)
    own.stop()
    assert not any(Path(h.mount_point + own.place.cgroup_parent).exists() for h in detect().hierarchies)
