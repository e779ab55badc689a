"""Ends that the database did not take at first."""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.engine import eventually

from corral.store import Database, Transaction
from corral.tasks import store
from corral.tasks.bundle import Bundles
from corral.tasks.ends import Ends
from corral.tasks.live import Process, Task
from corral.tasks.model import LogRow, ProcessRow, TaskKey, TaskRow
from corral.tasks.registry import Registry

LOG = LogRow("json-file", "/log", 1, 2)


class Scene:
    def __init__(self, directory: Path, database: Database) -> None:
        self.directory = directory
        self.database = database
        self.registry = Registry()
        self.ends = Ends(self.registry, database)

    def started(self, name: str) -> Task:
        key = TaskKey("default", name)
        row = TaskRow(
            key=key, created_at_ns=1, shim_pid=0, shim_start_time=0, create="{}", log=LOG, cgroup_paths=(), labels={}
        )
        init = replace(ProcessRow(task=key, exec_id=""), pid=1, start_time=1)
        task = Task(row, Bundles(self.directory, self.directory).of(key), [Process(init)])
        self.registry.add(task)
        return task

    def told(self) -> list[str]:
        return [row[0] for row in self.database.read_sync(lambda s: s.execute("SELECT subject FROM journal"))]

    async def are_told(self, *names: str) -> None:
        async def all_are() -> bool:
            return sorted(self.told()) == sorted(names)

        await eventually(all_are)


class Writing:
    """Of an end. Fails in these ways first."""

    def __init__(self, name: str, *failures: Exception) -> None:
        self._name = name
        self._failures = list(failures)

    def __call__(self, transaction: Transaction) -> None:
        if self._failures:
            raise self._failures.pop(0)
        transaction.journal("task.ended", self._name, namespace="default")


def no_room() -> OSError:
    return OSError(errno.ENOSPC, "full")


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    with Database(tmp_path / "tasks.db", store.MIGRATIONS, durable=False) as database:
        scene = Scene(tmp_path, database)
        yield scene
        await scene.registry.stop()


async def test_what_could_not_be_written_for_another_reason_is_written_with_the_next_one(scene: Scene) -> None:
    await scene.ends.write(scene.started("a").init, Writing("a", no_room(), ValueError("odd")))
    [attempts] = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait([attempts])
    await scene.ends.write(scene.started("b").init, Writing("b", no_room()))
    await scene.are_told("a", "b")


async def test_an_end_that_comes_while_nothing_is_left_to_write_is_written_by_those_same_attempts(
    scene: Scene,
) -> None:
    gone = scene.started("gone")
    await scene.ends.write(gone.init, Writing("gone", no_room()))
    [attempts] = asyncio.all_tasks() - {asyncio.current_task()}
    scene.registry.remove(gone)
    begun, go_on = threading.Event(), threading.Event()

    def wait(_: Transaction) -> None:
        begun.set()
        go_on.wait()

    slow = asyncio.create_task(scene.database.write(wait))
    await asyncio.to_thread(begun.wait)
    write = scene.ends.write(scene.started("b").init, Writing("b", no_room()))
    late = asyncio.create_task(write)
    await asyncio.sleep(0.5)  # the attempt waits behind it
    go_on.set()
    await late
    assert asyncio.all_tasks() - {asyncio.current_task(), slow, late} == {attempts}
    await scene.are_told("b")
