"""The parent of all cgroups belongs to one engine, and keeps its limits, whatever somebody does to it meanwhile."""

import os
from collections.abc import Iterator

import pytest
from support.cgroups import inside, sleep
from support.cgroups_leaf import MIB, Leaf, connected
from support.corrald import Corrald
from support.requirements import needs

from corral.api.cgroups.v1 import cgroups_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.api.types.v1.types_pb2 import CpuResources, Resources
from corral.kernel.cgroup import OWNER, detect, open_driver
from corral.rpc.errors import FailedPrecondition, InvalidArgument

pytestmark = needs("root", "cgroup")

NONE = Resources()


@pytest.fixture
def own() -> Iterator[Corrald]:
    with Corrald(services=("cgroups",)) as corrald:
        yield corrald


@pytest.fixture
def other(own: Corrald) -> Iterator[Corrald]:
    """An engine with another root, that is told to have the same parent."""
    with Corrald(services=("cgroups",), settings={"cgroups": {"parent": own.place.cgroup_parent}}) as corrald:
        yield corrald
        for name, process in [*corrald.processes.items()]:
            if process.poll() is not None:  # it never came up
                del corrald.processes[name]


def start(corrald: Corrald, **limits: float) -> None:
    corrald.settings = {"cgroups": limits}
    corrald.start()


async def limits_of(leaf: Leaf) -> tuple[int, float, int]:
    limits = (await leaf.stub.Host(pb.HostRequest())).limits
    return limits.memory_bytes, limits.cpus, limits.pids


def is_refused(other: Corrald, own: Corrald) -> None:
    with pytest.raises(RuntimeError, match=f"belong to the corral whose data is in {own.root / 'cgroups'}"):
        other.start()


async def test_a_parent_made_again_is_still_ours_and_another_engine_kills_nobody(own: Corrald, other: Corrald) -> None:
    start(own)
    open_driver(detect()).prune(own.place.cgroup_parent)
    async with connected(own) as leaf:
        await leaf.create("precious", NONE)
        with inside(leaf.kernel("precious"), sleep) as child:
            own.kill9()
            is_refused(other, own)
            assert child.alive()
            start(own)
        await leaf.delete("precious")


async def test_another_engine_does_not_take_the_parent_of_one_that_runs_without_cgroups(
    own: Corrald, other: Corrald
) -> None:
    start(own, memory_bytes=64 * MIB)
    is_refused(other, own)
    async with connected(own) as leaf:
        assert await limits_of(leaf) == (64 * MIB, 0, 0)  # nor has the other removed it as it ended


def test_the_parent_of_an_engine_that_was_killed_is_another_s_with_none_of_its_limits(own: Corrald) -> None:
    start(own, pids=30)
    own.kill9()
    parent = own.place.cgroup_parent
    with Corrald(services=("cgroups",), settings={"cgroups": {"parent": parent}}) as other:
        other.start()
        driver = open_driver(detect())
        assert driver.marked(parent, OWNER) == str(other.root / "cgroups")
        assert driver.open(parent).pids_limit() == -1


async def test_nothing_is_made_in_a_parent_that_has_become_another_s(own: Corrald) -> None:
    start(own)
    driver, parent = open_driver(detect()), own.place.cgroup_parent
    stranger = driver.create(f"{parent}/default/theirs")
    driver.mark(parent, OWNER, "/nowhere")
    try:
        async with connected(own) as leaf:
            with pytest.raises(FailedPrecondition, match="belong to the corral whose data is in /nowhere"):
                await leaf.create("mine", NONE)
            assert not leaf.kernel("mine").exists()
            found = (await leaf.stub.Check(types_pb2.CheckRequest(repair=True))).findings
            assert not [each for each in found if "theirs" in each.subject]
            assert stranger.exists()
    finally:
        stranger.remove()
        own.stop()
        assert driver.open(parent).exists()
        driver.prune(f"{parent}/default")


async def test_a_limit_that_was_lost_in_one_hierarchy_is_set_again(own: Corrald) -> None:
    start(own, memory_bytes=64 * MIB, pids=30)
    memory, pids = (detect().of(name) for name in ("memory", "pids"))
    assert memory is not None
    if memory == pids:
        return  # there is one hierarchy, and another test removes that
    os.rmdir(f"{memory.mount_point}{own.place.cgroup_parent}")  # noqa: PTH106 - of a cgroup
    async with connected(own) as leaf:
        await leaf.create("next", NONE)
        assert await limits_of(leaf) == (64 * MIB, 0, 30)
        await leaf.delete("next")


@needs("cgroup1")
async def test_cpu_time_is_compared_by_the_period_that_the_cgroup_has(own: Corrald) -> None:
    start(own, cpus=1.0)
    async with connected(own) as leaf:
        await leaf.create("slow", Resources(cpu=CpuResources(quota_us=800_000, period_us=1_000_000)))
        await leaf.update("slow", cpu=CpuResources(quota_us=900_000))
        with pytest.raises(InvalidArgument, match=r"1\.8 CPUs are more than all containers may use together, 1: ask"):
            await leaf.update("slow", cpu=CpuResources(period_us=500_000))
        await leaf.delete("slow")


@needs("cgroup1")
async def test_cpu_time_of_a_cgroup_elsewhere_is_not_bounded(own: Corrald) -> None:
    start(own, cpus=1.0)
    elsewhere = f"{own.place.cgroup_parent}-else"
    async with connected(own) as leaf:
        await leaf.create("free", Resources(cpu=CpuResources(quota_us=150_000)), parent=elsewhere)
        await leaf.update("free", cpu=CpuResources(quota_us=180_000))
        await leaf.delete("free")
    open_driver(detect()).prune(elsewhere)


@needs("cgroup1")
async def test_cpu_time_is_not_bounded_by_a_limit_that_containers_held_up(own: Corrald) -> None:
    own.start()
    async with connected(own) as leaf:
        await leaf.create("big", Resources(cpu=CpuResources(quota_us=150_000)))
        with inside(leaf.kernel("big"), sleep):
            own.stop()
            start(own, cpus=1.0)
            async with connected(own) as again:
                await again.update("big", cpu=CpuResources(quota_us=140_000))
                await again.delete("big")
