"""The cgroups leaf over gRPC: a corrald that hosts it alone, real cgroups."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.cgroups import inside, sleep
from support.cgroups_leaf import LIMITS, MIB, Leaf, connected
from support.corrald import Corrald
from support.requirements import needs

from corral.api.cgroups.v1 import cgroups_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.kernel.cgroup import PidsLimits, PidsStats, Resources, detect, open_driver
from corral.rpc.context import in_namespace
from corral.rpc.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unimplemented,
)

pytestmark = needs("root", "cgroup")


@pytest.fixture(scope="module")
def shared() -> Iterator[Corrald]:
    with Corrald(services=("cgroups",)) as corrald:
        corrald.start()
        yield corrald


@pytest.fixture
async def leaf(shared: Corrald) -> AsyncIterator[Leaf]:
    async with connected(shared) as leaf:
        yield leaf


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


async def test_the_shares_of_the_row_hold_again_once_it_does_not_idle(leaf: Leaf) -> None:
    await leaf.create("idling")
    [cpu] = [path for path in leaf.kernel("idling").paths() if (path / "cpu.idle").exists()]
    weight = next(path for name in ("cpu.shares", "cpu.weight") if (path := cpu / name).exists())
    before = weight.read_text()
    await leaf.update("idling", cpu=types_pb2.CpuResources(idle=1))
    with pytest.raises(InvalidArgument, match="an idle cgroup has no CPU shares"):
        await leaf.update("idling", cpu=types_pb2.CpuResources(shares=700))
    after = await leaf.update("idling", cpu=types_pb2.CpuResources(idle=0))
    assert (weight.read_text(), after.resources.cpu.shares) == (before, 512)
    await leaf.delete("idling")


async def test_the_real_time_cpu_time_of_a_removed_cgroup_is_free_at_once(leaf: Leaf) -> None:
    if not _has_realtime():
        with pytest.raises(Unimplemented):
            await leaf.create("first", _realtime(20_000))
        return
    await leaf.create("first", _realtime(20_000))
    await leaf.create("last", _realtime(20_000))
    await leaf.delete("first")
    await leaf.update("last", cpu=_realtime(40_000).cpu)
    await leaf.delete("last")
    await leaf.create("next", _realtime(40_000))
    await leaf.delete("next")


def _has_realtime() -> bool:
    hierarchy = detect().of("cpu")
    return hierarchy is not None and Path(f"{hierarchy.mount_point}/cpu.rt_runtime_us").exists()


def _realtime(runtime_us: int) -> types_pb2.Resources:
    return types_pb2.Resources(cpu=types_pb2.CpuResources(realtime_runtime_us=runtime_us))


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


async def test_a_reading_is_an_old_one_only_where_nothing_ran_and_no_limit_was_changed(leaf: Leaf) -> None:
    async def pids_limit(max_age_ms: int = 60_000) -> int:
        request = pb.StatsRequest(ids=["idle"], max_age_ms=max_age_ms)
        [[reading]] = [list(each.stats) async for each in leaf.stub.Stats(request)]
        assert abs(reading.read_at.ToNanoseconds() - time.time_ns()) < 10**9  # as of now, also if it is an old one
        return reading.pids.limit

    def body(say: int) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: os.write(say, b"r"))
        while True:
            signal.pause()

    def by_another_hand(limit: int) -> None:
        leaf.kernel("idle").apply(Resources(pids=PidsLimits(limit)))

    await leaf.create("idle")
    with inside(leaf.kernel("idle"), body) as child:
        await asyncio.sleep(0.1)
        assert await pids_limit() == 50
        by_another_hand(40)
        assert await pids_limit() == 50
        assert await pids_limit(0) == 40
        os.kill(child.pid, signal.SIGUSR1)
        assert child.hear() == b"r"
        assert await pids_limit() == 40
        by_another_hand(30)
        await leaf.update("idle", memory=types_pb2.MemoryResources(limit_bytes=64 * MIB, swap_bytes=64 * MIB))
        assert await pids_limit() == 30
        by_another_hand(20)
        await asyncio.sleep(0.2)
        assert await pids_limit(100) == 20
    await leaf.delete("idle")


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


def test_an_error_of_permission_is_one() -> None:
    from corral.cgroups.errors import translated

    with pytest.raises(PermissionDenied, match=r"cannot do this: no \(/x\)"), translated("do this"):
        raise OSError(1, "no", "/x")
