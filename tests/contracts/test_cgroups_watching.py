"""Readings that are kept, and watches of pressure: neither stale nor lost nor left behind."""

import asyncio
import errno
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.cgroups import fresh_path, inside, parent, spin
from support.requirements import needs

from corral.api.types.v1 import types_pb2
from corral.cgroups import store
from corral.cgroups.engine_limits import EngineLimits
from corral.cgroups.groups import Groups, Timeouts
from corral.cgroups.parent import Parent
from corral.cgroups.pressure import MOST, PressureWatcher
from corral.cgroups.readings import Readings
from corral.cgroups.store import Key, Record, State
from corral.kernel.cgroup import (
    Cgroup,
    CpuLimits,
    PidsLimits,
    PressureTrigger,
    Resources,
    Stats,
    detect,
    open_driver,
)
from corral.rpc.errors import FailedPrecondition, InvalidArgument
from corral.store import Database

pytestmark = needs("root", "cgroup")

KEY = Key("ns", "one")
BUSY = types_pb2.PressureTrigger(resource="cpu", stall_us=50_000, window_us=2_000_000)


def record(count: int = 1) -> Record:
    """Of a cgroup whose pressure is watched."""
    limits = types_pb2.Resources(pressure=types_pb2.PressureTriggers(triggers=[BUSY] * count))
    limits.cpu.quota_us, limits.cpu.period_us = 10_000, 100_000
    wanted = limits.SerializeToString(deterministic=True)
    return Record(KEY, f"{parent()}-own/ns/one", State.READY, wanted, wanted, {}, 1)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "cgroups.db", store.MIGRATIONS, durable=False, on_loop=True)
    yield database
    database.close()


@pytest.fixture
async def groups(tmp_path: Path, database: Database) -> AsyncIterator[Groups]:
    driver = open_driver(detect())
    ours = Parent(driver, f"{parent()}-own", tmp_path, EngineLimits())
    ours.claim()
    groups = Groups(database, driver, Timeouts(10, 10), ours)
    yield groups
    await groups.delete(KEY)
    await groups.close()
    driver.open(ours.path).remove()


@pytest.fixture
def group() -> Iterator[Cgroup]:
    driver = open_driver(detect())
    group = driver.create(fresh_path())
    yield group
    group.remove()
    driver.prune(f"{parent()}/ns")


async def happens(database: Database, topic: str) -> None:
    """Wait until an event is in the journal."""
    async with asyncio.timeout(30):
        async for event in database.journal.follow(0):
            if event.topic == topic:
                return


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted


@needs("psi")
async def test_a_cgroup_that_could_not_be_deleted_is_still_watched(
    groups: Groups, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(self: Cgroup, timeout_s: float = 0) -> None:
        raise OSError(errno.EBUSY, "processes do not die", self.path)

    await groups.create(record(), announce=False)
    with monkeypatch.context() as patch:
        patch.setattr(Cgroup, "remove", stuck)
        with pytest.raises(FailedPrecondition, match="do not die"):
            await groups.delete(KEY)
    with inside(groups.open(groups.find(KEY)), lambda _: spin(3600)):
        await happens(database, "cgroup.pressure")


@needs("psi")
async def test_a_create_that_can_not_be_written_down_leaves_no_watch(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(transaction: object, record: Record, *, over_intent: bool) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    await groups.create(record(), announce=False)
    await groups.delete(KEY)
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(store, "put_ready", full)
        with pytest.raises(sqlite3.OperationalError):
            await groups.create(record(), announce=False)
    assert descriptors() <= before  # a checkpoint may have ended
    await groups.create(record(), announce=False)  # over what was left


@needs("psi")
async def test_more_triggers_than_there_are_kinds_of_pressure_are_refused(groups: Groups) -> None:
    with pytest.raises(InvalidArgument, match=f"{MOST + 1} triggers of pressure are too many: ask for at most {MOST}"):
        await groups.create(record(MOST + 1), announce=False)
    made = await groups.create(record(MOST), announce=False)
    with pytest.raises(InvalidArgument, match="too many"):
        await groups.update(KEY, types_pb2.Resources.FromString(record(MOST + 1).resources))
    assert groups.find(KEY) == made


@needs("psi")
async def test_pressure_that_was_seen_is_told_before_the_watcher_is_closed(group: Cgroup) -> None:
    group.apply(Resources(cpu=CpuLimits(quota_us=10_000, period_us=100_000)))
    began, told = asyncio.Event(), []

    async def tell(key: Key, trigger: PressureTrigger) -> None:
        began.set()
        await asyncio.sleep(0.2)
        told.append(key)

    watcher = PressureWatcher(tell)
    watcher.put(KEY, [group.watch_pressure(PressureTrigger("cpu", 50_000, 2_000_000))])
    with inside(group, lambda _: spin(3600)):
        await asyncio.wait_for(began.wait(), 30)
    watcher.drop(KEY)
    await watcher.close()
    assert told == [KEY]


@needs("psi")
def test_the_pressure_of_who_waits_for_cpu_time_is_told_as_it_is_now(group: Cgroup) -> None:
    """It gets a millisecond of each second: as a rule it did not run since the reading before."""
    group.apply(Resources(cpu=CpuLimits(quota_us=1_000, period_us=1_000_000)))
    readings, behind_us = Readings(open_driver(detect())), []
    with inside(group, lambda _: spin(3600)):
        time.sleep(1.2)
        for _ in range(30):
            [(_, _, kept)] = readings.read({"x": group.path}, 5.0)
            now = group.read()
            assert kept.cpu
            assert now.cpu
            assert kept.cpu.pressure
            assert now.cpu.pressure
            behind_us.append(now.cpu.pressure.some_total_us - kept.cpu.pressure.some_total_us)
            time.sleep(0.1)
    assert sorted(behind_us)[len(behind_us) // 2] < 50_000
    assert kept.cpu.pressure.some_total_us > 1_000_000


def test_a_reading_from_before_a_change_is_not_kept_after_it(group: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    group.apply(Resources(pids=PidsLimits(50)))
    readings, has_read, go_on = Readings(open_driver(detect())), threading.Event(), threading.Event()
    read = Cgroup.read

    def slow(self: Cgroup) -> Stats:
        stats = read(self)
        has_read.set()
        go_on.wait()
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(Cgroup, "read", slow)
        reader = threading.Thread(target=lambda: list(readings.read({"x": group.path}, 60.0)))
        reader.start()
        has_read.wait()
        group.apply(Resources(pids=PidsLimits(7)))
        readings.forget(group.path)
        go_on.set()
        reader.join()
    [(_, _, stats)] = readings.read({"x": group.path}, 60.0)
    assert stats.pids
    assert stats.pids.limit == 7
