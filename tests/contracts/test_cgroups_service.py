"""The cgroups leaf over gRPC: a corrald that hosts it alone, real cgroups, real crashes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.cgroups import eventually, inside, sleep
from support.corrald import Corrald
from support.requirements import needs

from corral.api.cgroups.v1 import cgroups_pb2 as pb
from corral.api.cgroups.v1.cgroups_pb2_grpc import CgroupsStub
from corral.api.types.v1 import types_pb2
from corral.kernel.cgroup import Cgroup, PidsStats, detect, open_driver
from corral.rpc.channel import open_channel
from corral.rpc.context import in_namespace
from corral.rpc.errors import (
    AlreadyExists,
    CorralError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unimplemented,
)

if TYPE_CHECKING:
    from corral.api.cgroups.v1.cgroups_pb2_grpc import CgroupsAsyncStub

pytestmark = needs("root", "cgroup")
MIB = 1 << 20
LIMITS = types_pb2.Resources(
    cpu=types_pb2.CpuResources(shares=512, quota_us=50_000, period_us=100_000),
    memory=types_pb2.MemoryResources(limit_bytes=32 * MIB, swap_bytes=32 * MIB),
    pids=types_pb2.PidsResources(limit=50),
)


@dataclass(slots=True)
class Leaf:
    """Calls to the leaf, and a look at what it does in the kernel."""

    stub: "CgroupsAsyncStub"
    corrald: Corrald

    async def create(
        self, name: str, resources: types_pb2.Resources = LIMITS, parent: str = "", **labels: str
    ) -> pb.Cgroup:
        request = pb.CreateCgroupRequest(id=name, parent=parent, resources=resources, labels=labels)
        return await self.stub.Create(request)

    async def get(self, name: str) -> pb.Cgroup:
        return await self.stub.Get(pb.GetCgroupRequest(id=name))

    async def update(self, name: str, **parts: object) -> pb.Cgroup:
        change = types_pb2.Resources(**parts)  # type: ignore[arg-type]
        return await self.stub.Update(pb.UpdateCgroupRequest(id=name, resources=change))

    async def delete(self, name: str, *, must_exist: bool = False) -> None:
        await self.stub.Delete(pb.DeleteCgroupRequest(id=name, must_exist=must_exist))

    async def stats(self, *names: str) -> list[pb.Stats]:
        [answer] = [each async for each in self.stub.Stats(pb.StatsRequest(ids=names))]
        return list(answer.stats)

    async def names(self, *, all_namespaces: bool = False) -> list[str]:
        listed = await self.stub.List(pb.ListCgroupsRequest(all_namespaces=all_namespaces))
        return [each.id for each in listed.cgroups]

    async def oom(self, subject: str) -> None:
        """Wait until an OOM is journalled."""
        async with asyncio.timeout(5):
            async for _ in self.stub.Events(types_pb2.EventsRequest(subjects=[subject], topics=["cgroup.oom"])):
                return

    async def topics(self, subject: str) -> list[str]:
        request = types_pb2.EventsRequest(no_follow=True, subjects=[subject])
        return [each.event.topic async for each in self.stub.Events(request)]

    def kernel(self, name: str, namespace: str = "default") -> Cgroup:
        return open_driver(detect()).open(f"{self.corrald.place.cgroup_parent}/{namespace}/{name}")


@asynccontextmanager
async def connected(corrald: Corrald) -> AsyncIterator[Leaf]:
    channel = open_channel(corrald.address_of("cgroups"))
    try:
        yield Leaf(CgroupsStub(channel), corrald)
    finally:
        await channel.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Corrald]:
    with Corrald(services=("cgroups",)) as corrald:
        corrald.start()
        yield corrald


@pytest.fixture
async def leaf(shared: Corrald) -> AsyncIterator[Leaf]:
    async with connected(shared) as leaf:
        yield leaf


@pytest.fixture
def own() -> Iterator[Corrald]:
    """A daemon that the test may kill."""
    with Corrald(services=("cgroups",)) as corrald:
        yield corrald


async def test_a_cgroup_is_made_with_its_limits_and_removed_again(leaf: Leaf) -> None:
    made = await leaf.create("life", a="b")
    assert made.path == leaf.kernel("life").path
    assert made.join_paths == [str(path) for path in leaf.kernel("life").paths()]
    assert await leaf.get("life") == made
    assert (made.resources, dict(made.labels), made.frozen) == (LIMITS, {"a": "b"}, False)
    reading = leaf.kernel("life").read()
    assert reading.memory is not None
    assert reading.memory.limit_bytes == 32 * MIB
    await leaf.delete("life", must_exist=True)
    assert not leaf.kernel("life").exists()
    assert await leaf.topics("life") == ["cgroup.created", "cgroup.removed"]


async def test_the_same_create_again_gives_the_same_answer_and_another_one_is_refused(leaf: Leaf) -> None:
    made = await leaf.create("twice")
    assert await leaf.create("twice") == made
    with pytest.raises(AlreadyExists, match="other settings"):
        await leaf.create("twice", types_pb2.Resources())
    assert await leaf.topics("twice") == ["cgroup.created"]
    await leaf.delete("twice")


async def test_a_create_with_the_limits_that_updates_left_gives_what_is_there(leaf: Leaf) -> None:
    await leaf.create("restarted")
    after = await leaf.update("restarted", pids=types_pb2.PidsResources(limit=7))
    assert await leaf.create("restarted", after.resources) == after
    with pytest.raises(AlreadyExists):
        await leaf.create("restarted", types_pb2.Resources(pids=types_pb2.PidsResources(limit=8)))
    await leaf.delete("restarted")


async def test_a_create_again_makes_anew_what_another_removed(leaf: Leaf) -> None:
    made = await leaf.create("vanished")
    leaf.kernel("vanished").remove()
    assert await leaf.create("vanished") == made
    assert leaf.kernel("vanished").read().pids == PidsStats(0, 50)
    await leaf.delete("vanished")


async def test_many_creates_of_one_name_at_once_make_one(leaf: Leaf) -> None:
    made = await asyncio.gather(*(leaf.create("race") for _ in range(8)))
    assert len({each.SerializeToString(deterministic=True) for each in made}) == 1
    await asyncio.gather(*(leaf.delete("race") for _ in range(8)))
    assert await leaf.topics("race") == ["cgroup.created", "cgroup.removed"]


async def test_what_is_not_there_is_not_found_and_its_delete_is_no_error(leaf: Leaf) -> None:
    await leaf.delete("nobody")
    with pytest.raises(NotFound, match="there is no cgroup 'nobody'"):
        await leaf.delete("nobody", must_exist=True)
    for call in (leaf.get("nobody"), leaf.update("nobody"), leaf.stats("nobody")):
        with pytest.raises(NotFound):
            await call


async def test_namespaces_do_not_see_each_other(leaf: Leaf) -> None:
    with in_namespace("blue"):
        await leaf.create("shared-name")
        assert await leaf.names() == ["shared-name"]
    with pytest.raises(NotFound):
        await leaf.get("shared-name")
    assert "shared-name" not in await leaf.names()
    assert "shared-name" in await leaf.names(all_namespaces=True)
    assert leaf.kernel("shared-name", "blue").exists()
    with in_namespace("blue"):
        await leaf.delete("shared-name")


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 129])
async def test_a_bad_id_is_refused(leaf: Leaf, name: str) -> None:
    with pytest.raises(InvalidArgument, match="cgroup id"):
        await leaf.create(name)


async def test_a_limit_that_the_kernel_refuses_makes_no_cgroup(leaf: Leaf) -> None:
    bad = types_pb2.Resources(cpu=types_pb2.CpuResources(cpus="9999"))
    with pytest.raises(InvalidArgument, match=r"'9999'.*cpuset\.cpus"):
        await leaf.create("refused", bad)
    assert not leaf.kernel("refused").exists()
    assert await leaf.topics("refused") == []


async def test_an_update_changes_what_it_names_and_a_refused_one_nothing(leaf: Leaf) -> None:
    await leaf.create("changing")
    after = await leaf.update("changing", pids=types_pb2.PidsResources(limit=7))
    assert (after.resources.pids.limit, after.resources.cpu.shares) == (7, 512)
    with pytest.raises(InvalidArgument):
        await leaf.update("changing", pids=types_pb2.PidsResources(limit=9), cpu=types_pb2.CpuResources(shares=1))
    with pytest.raises(InvalidArgument):
        await leaf.update(
            "changing",
            pids=types_pb2.PidsResources(limit=9),
            io=types_pb2.IoResources(devices=[types_pb2.IoDeviceLimit(major=250, minor=250, read_bytes_per_s=1)]),
        )
    assert await leaf.get("changing") == after
    [reading] = await leaf.stats("changing")
    assert reading.pids.limit == 7
    assert await leaf.topics("changing") == ["cgroup.created", "cgroup.updated"]
    await leaf.delete("changing")


async def test_a_limit_that_this_host_cannot_give_is_unimplemented(leaf: Leaf) -> None:
    await leaf.create("wanting")
    host = await leaf.stub.Host(pb.HostRequest())
    wanted = types_pb2.MemoryResources(high_bytes=MIB)
    if host.layout == pb.HostResponse.LAYOUT_V2:
        wanted = types_pb2.MemoryResources(swappiness=10)
    with pytest.raises(Unimplemented):
        await leaf.update("wanting", memory=wanted)
    await leaf.delete("wanting")


async def test_without_rules_of_its_own_a_cgroup_opens_only_the_usual_devices(leaf: Leaf) -> None:
    await leaf.create("devices")
    with inside(leaf.kernel("devices"), lambda _: os.open("/dev/kmsg", os.O_RDONLY)) as child:
        assert os.waitstatus_to_exitcode(child.wait()) == 1  # EPERM
    await leaf.update("devices", devices=[types_pb2.DeviceRule(allow=True)])
    with inside(leaf.kernel("devices"), lambda _: os.open("/dev/kmsg", os.O_RDONLY)) as child:
        assert child.wait() == 0
    await leaf.delete("devices")


async def test_freeze_and_thaw_are_idempotent_and_journalled_once(leaf: Leaf) -> None:
    await leaf.create("cold")
    with inside(leaf.kernel("cold"), sleep):
        for _ in range(2):
            await leaf.stub.Freeze(pb.FreezeRequest(id="cold"))
        assert (await leaf.get("cold")).frozen
        for _ in range(2):
            await leaf.stub.Thaw(pb.ThawRequest(id="cold"))
        assert not (await leaf.get("cold")).frozen
    await leaf.delete("cold")
    assert await leaf.topics("cold") == ["cgroup.created", "cgroup.frozen", "cgroup.thawed", "cgroup.removed"]


async def test_kill_sends_the_signal_that_is_asked_for(leaf: Leaf) -> None:
    await leaf.create("killed")
    for asked, seen in ((0, signal.SIGKILL), (signal.SIGTERM, signal.SIGTERM)):
        with inside(leaf.kernel("killed"), sleep) as child:
            await leaf.stub.Kill(pb.KillRequest(id="killed", signal=asked))
            assert os.WTERMSIG(child.wait()) == seen
    with pytest.raises(InvalidArgument, match="no signal 65"):
        await leaf.stub.Kill(pb.KillRequest(id="killed", signal=65))
    await leaf.delete("killed")


async def test_delete_kills_what_is_inside(leaf: Leaf) -> None:
    await leaf.create("full")
    with inside(leaf.kernel("full"), sleep) as child:
        await leaf.delete("full")
        assert os.WTERMSIG(child.wait()) == signal.SIGKILL
    assert not leaf.kernel("full").exists()


async def test_an_oom_kill_is_journalled_and_counted(leaf: Leaf) -> None:
    await leaf.create("hungry")
    with inside(leaf.kernel("hungry"), lambda _: bytearray(128 * MIB)) as child:
        assert os.WTERMSIG(child.wait()) == signal.SIGKILL
    await leaf.oom("hungry")
    assert (await leaf.get("hungry")).oom_kills == 1
    await leaf.delete("hungry")
    assert await leaf.topics("hungry") == ["cgroup.created", "cgroup.oom", "cgroup.removed"]


async def test_stats_of_a_namespace_come_once_or_in_a_stream(leaf: Leaf) -> None:
    with in_namespace("measured"):
        for name in ("one", "two"):
            await leaf.create(name)
        assert [each.id for each in await leaf.stats()] == ["one", "two"]
        stream = leaf.stub.Stats(pb.StatsRequest(ids=["two"], interval_ms=100))
        readings: list[pb.Stats] = []
        async for answer in stream:
            readings += answer.stats
            if len(readings) == 3:
                break
        stream.cancel()
        times = [each.read_at.ToNanoseconds() for each in readings]
        assert times[0] < times[1] < times[2]
        for name in ("one", "two"):
            await leaf.delete(name)


async def test_a_parent_of_the_callers_choice_is_used(leaf: Leaf) -> None:
    parent = f"{leaf.corrald.place.cgroup_parent}x"
    made = await leaf.create("elsewhere", parent=parent)
    assert made.path == f"{parent}/elsewhere"
    with in_namespace("other"), pytest.raises(AlreadyExists, match="another cgroup of corral"):
        await leaf.create("elsewhere", parent=parent)
    await leaf.delete("elsewhere")
    open_driver(detect()).prune(parent)
    for bad in ("relative", "/", "/a/../b", leaf.corrald.place.cgroup_parent):
        with pytest.raises(InvalidArgument, match="cgroup parent"):
            await leaf.create("elsewhere", parent=bad)


async def test_a_cgroup_in_the_way_that_has_processes_is_left_alone(leaf: Leaf) -> None:
    stranger = open_driver(detect()).create(leaf.kernel("taken").path)
    with inside(stranger, sleep) as child:
        with pytest.raises(FailedPrecondition, match=str(child.pid)):
            await leaf.create("taken")
        assert child.alive()
    await leaf.create("taken")  # it is empty now
    await leaf.delete("taken")


async def test_the_host_is_described(leaf: Leaf) -> None:
    host = await leaf.stub.Host(pb.HostRequest())
    layout = detect()
    assert pb.HostResponse.Layout.Name(host.layout) == f"LAYOUT_{layout.kind.name}"
    memory = layout.of("memory")
    assert memory is not None
    [found] = [each for each in host.controllers if each.name == "memory"]
    assert (found.version, found.mountpoint) == (memory.version, memory.mount_point)


# Crashes and restarts


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


def test_an_error_of_permission_is_one() -> None:
    from corral.cgroups.errors import translated

    with pytest.raises(PermissionDenied, match=r"cannot do this: no \(/x\)"), translated("do this"):
        raise OSError(1, "no", "/x")
