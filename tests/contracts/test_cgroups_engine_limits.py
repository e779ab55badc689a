"""What all containers together may use: held by the kernel, lifted when it is no setting any more, refused by name."""

import asyncio
import contextlib
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.cgroups import Child, eventually, inside, parent, sleep, spin
from support.cgroups_leaf import MIB, Leaf, connected
from support.corrald import Corrald
from support.requirements import needs

from corral.api.cgroups.v1 import cgroups_pb2 as pb
from corral.api.types.v1.types_pb2 import CpuResources, Resources
from corral.cgroups.engine_limits import MARK, EngineLimits, enforce
from corral.kernel import process
from corral.kernel.cgroup import Driver, Layout, MemoryLimits, detect, open_driver
from corral.kernel.cgroup import Resources as Limits
from corral.rpc.errors import InvalidArgument, Unimplemented

pytestmark = needs("root", "cgroup")

NONE = Resources()


@pytest.fixture
def own() -> Iterator[Corrald]:
    """A daemon that is started with the limits of the test."""
    with Corrald(services=("cgroups",)) as corrald:
        yield corrald


def start(corrald: Corrald, **limits: float) -> None:
    corrald.settings = {"cgroups": limits}
    corrald.start()


def restart(corrald: Corrald, **limits: float) -> None:
    corrald.stop()
    start(corrald, **limits)


async def limits_of(leaf: Leaf) -> tuple[int, float, int]:
    limits = (await leaf.stub.Host(pb.HostRequest())).limits
    return limits.memory_bytes, limits.cpus, limits.pids


@contextlib.asynccontextmanager
async def crowd(leaf: Leaf, body: Callable[[int], object], count: int = 2):
    """Processes in cgroups of their own that have no limits. They begin together: v1 lets in one too many."""
    gate, opener = os.pipe()

    def begin(say: int) -> None:
        os.read(gate, 1)
        body(say)

    async with contextlib.AsyncExitStack() as stack:
        for end in (gate, opener):
            stack.callback(os.close, end)
        children = []
        for number in range(count):
            name = f"one-of-{number}"
            await leaf.create(name, NONE)
            stack.push_async_callback(leaf.delete, name)
            children.append(stack.enter_context(inside(leaf.kernel(name), begin)))
        os.write(opener, bytes(count))
        yield children


def hold_memory(say: int) -> None:
    area = mmap.mmap(-1, 40 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(area), mmap.PAGESIZE):
        area[at] = 1
    os.write(say, b"h")
    time.sleep(3600)


def fork_many(say: int) -> None:
    """Tell how many more there may be."""
    children = []
    with contextlib.suppress(BlockingIOError):
        while len(children) < 100:
            pid, _ = process.clone(0)  # not os.fork(), after which gRPC would wait for threads that only the parent has
            if pid == 0:
                time.sleep(3600)
            children.append(pid)
    os.write(say, bytes([len(children)]))
    time.sleep(3600)


async def test_containers_that_together_take_more_memory_are_held_while_the_leaf_answers(own: Corrald) -> None:
    start(own, memory_bytes=64 * MIB)
    async with connected(own) as leaf, crowd(leaf, hold_memory) as children:
        assert eventually(lambda: not all(child.alive() for child in children))
        limits = (await leaf.stub.Host(pb.HostRequest())).limits
        assert limits.memory_usage_bytes <= limits.memory_bytes == 64 * MIB
        dead = [child for child in children if not child.alive()]
        assert {os.WTERMSIG(child.wait()) for child in dead} == {signal.SIGKILL}


async def test_containers_that_together_fork_too_much_are_held_while_the_leaf_answers(own: Corrald) -> None:
    start(own, pids=30)
    async with connected(own) as leaf, crowd(leaf, fork_many) as children:
        assert sum(1 + child.hear()[0] for child in children) == 30
        limits = (await leaf.stub.Host(pb.HostRequest())).limits
        assert (limits.pids_current, limits.pids) == (30, 30)
        assert all(child.alive() for child in children)


def cpu_s(child: Child) -> float:
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throttled(own: Corrald) -> int:
    """In how many periods the parent's quota was used up."""
    stats = open_driver(detect()).open(own.place.cgroup_parent).read().cpu
    assert stats is not None
    return stats.throttled_periods


async def test_containers_together_get_no_more_cpu_time(own: Corrald) -> None:
    start(own, cpus=0.05)
    async with connected(own) as leaf, crowd(leaf, lambda _: spin(3600)) as children:
        before, stopped_before, began = sum(map(cpu_s, children)), throttled(own), time.monotonic()
        await asyncio.sleep(2)
        used = (sum(map(cpu_s, children)) - before) / (time.monotonic() - began)
        assert used < 0.15
        assert eventually(lambda: throttled(own) > stopped_before)  # it is the limit that keeps them, not the load
        assert await limits_of(leaf) == (0, 0.05, 0)


async def test_limits_hold_without_a_daemon_change_with_the_settings_and_go_with_them(own: Corrald) -> None:
    start(own, memory_bytes=64 * MIB, cpus=0.5, pids=30)
    group = open_driver(detect()).open(own.place.cgroup_parent)
    with contextlib.ExitStack() as processes:
        async with connected(own) as leaf:
            await leaf.create("stays", NONE)
            assert await limits_of(leaf) == (64 * MIB, 0.5, 30)
            # While gRPC's threads are idle: what they hold as they end the child would wait for.
            processes.enter_context(inside(leaf.kernel("stays"), sleep))
        own.kill9()
        assert (group.cpus(), group.read().pids.limit) == (0.5, 30)  # type: ignore[union-attr]
        start(own, memory_bytes=32 * MIB, cpus=1.5)
        async with connected(own) as leaf:
            assert await limits_of(leaf) == (32 * MIB, 1.5, 0)
        restart(own)
        async with connected(own) as leaf:
            assert await limits_of(leaf) == (0, 0, 0)
            await leaf.delete("stays")


async def test_a_limit_that_another_has_set_is_left_alone(own: Corrald) -> None:
    group = open_driver(detect()).create(own.place.cgroup_parent, Limits(memory=MemoryLimits(limit_bytes=64 * MIB)))
    try:
        start(own, pids=30)
        async with connected(own) as leaf:
            await leaf.create("stays", NONE)
        restart(own)
        async with connected(own) as leaf:
            assert await limits_of(leaf) == (64 * MIB, 0, 0)
            await leaf.delete("stays")
    finally:
        own.close()
        group.remove()


async def test_a_parent_that_somebody_removed_has_its_limits_again_with_the_next_cgroup(own: Corrald) -> None:
    start(own, pids=30)
    open_driver(detect()).open(own.place.cgroup_parent).remove()
    async with connected(own) as leaf:
        assert await limits_of(leaf) == (0, 0, 0)
        await leaf.create("next", NONE)
        assert await limits_of(leaf) == (0, 0, 30)
        await leaf.delete("next")


@needs("cgroup1")
async def test_where_containers_have_more_than_the_kernel_then_allows_the_daemon_starts_and_says_so(
    own: Corrald,
) -> None:
    own.start()
    async with connected(own) as leaf:
        await leaf.create("big", Resources(cpu=CpuResources(quota_us=150_000)))
        with inside(leaf.kernel("big"), hold_memory) as child:
            assert child.hear() == b"h"
            restart(own, cpus=1.0, memory_bytes=32 * MIB, pids=30)
            async with connected(own) as again:
                assert await limits_of(again) == (0, 0, 30)
                told = {event["setting"] for event in own.events("cgroups.engine_limit_not_set")}
                assert told == {"cpus", "memory_bytes"}
                await again.delete("big")


@needs("cgroup1")
async def test_more_cpus_than_there_are_for_all_is_refused_in_a_sentence(own: Corrald) -> None:
    start(own, cpus=1.0)
    async with connected(own) as leaf:
        with pytest.raises(InvalidArgument, match=r"1.5 CPUs are more than all containers may use together, 1: ask"):
            await leaf.create("greedy", Resources(cpu=CpuResources(quota_us=150_000)))
        await leaf.create("modest", Resources(cpu=CpuResources(quota_us=80_000)))
        with pytest.raises(InvalidArgument, match="more than all containers"):
            await leaf.update("modest", cpu=CpuResources(quota_us=60_000, period_us=50_000))
        await leaf.delete("modest")


def test_a_setting_that_makes_no_sense_is_refused_by_name(own: Corrald) -> None:
    for setting, value, sentence in (
        ("pids", -3, "pids must not be negative, and is -3: 0 is no limit"),
        ("cpus", 0.001, "cpus must be at least 0.01, or 0 for no limit, and is 0.001"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            start(own, **{setting: value})
        own.processes.clear()


@pytest.fixture
def bare() -> Iterator[tuple[Driver, str]]:
    """A parent that is not a daemon's."""
    driver = open_driver(detect())
    driver.create(parent())
    yield driver, parent()
    driver.open(parent()).remove()


@needs("cgroup1")
def test_a_limit_of_swap_that_another_has_set_outlives_a_limit_of_memory(bare: tuple[Driver, str]) -> None:
    driver, path = bare
    memory = driver.layout.of("memory")
    assert memory is not None
    swap = Path(f"{memory.mount_point}{path}/memory.memsw.limit_in_bytes")
    if not swap.exists():
        pytest.skip("needs swap that is counted")
    driver.open(path).apply(Limits(memory=MemoryLimits(limit_bytes=64 * MIB, swap_bytes=96 * MIB)))
    enforce(driver, path, EngineLimits(memory_bytes=32 * MIB))
    enforce(driver, path, EngineLimits())
    assert int(swap.read_text()) == 96 * MIB
    assert driver.open(path).memory_limit() == 96 * MIB  # as much as it may be


@needs("cgroup2")
def test_a_limit_that_would_kill_is_not_set_on_v2_nor_is_swap_changed(bare: tuple[Driver, str]) -> None:
    driver, path = bare
    driver.open(path).apply(Limits(memory=MemoryLimits(limit_bytes=512 * MIB, swap_bytes=768 * MIB)))
    group = driver.create(f"{path}/ns/big")
    with inside(group, hold_memory) as child:
        assert child.hear() == b"h"
        enforce(driver, path, EngineLimits(memory_bytes=128 * MIB))
        assert driver.open(path).memory_limit() == 128 * MIB
        enforce(driver, path, EngineLimits(memory_bytes=8 * MIB, pids=30))
        assert (driver.open(path).memory_limit(), driver.open(path).pids_limit()) == (128 * MIB, 30)
        time.sleep(1)
        assert child.alive()
        enforce(driver, path, EngineLimits())
        assert driver.open(path).memory_limit() == -1
    swap = Path(f"{driver.layout.of('memory').mount_point}{path}/memory.swap.max")  # type: ignore[union-attr]
    assert not swap.exists() or int(swap.read_text()) == 256 * MIB


def test_a_limit_that_this_host_can_not_give_is_refused_by_name() -> None:
    layout = detect()
    without = tuple(replace(each, controllers=each.controllers - {"pids"}) for each in layout.hierarchies)
    driver, path = Driver(Layout(layout.kind, without)), parent()
    driver.create(path)
    try:
        with pytest.raises(Unimplemented, match=r"cannot set \[cgroups\] pids = 30: .*'pids'.*change pids, or leave"):
            enforce(driver, path, EngineLimits(pids=30))
        enforce(driver, path, EngineLimits(memory_bytes=64 * MIB))
        assert driver.marked(path, MARK) == "memory_bytes"
    finally:
        driver.open(path).remove()
