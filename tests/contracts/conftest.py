"""Fixtures of the contract suites."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.corrald import Corrald
from support.tasks import TaskClient, make_rootfs, task_client


@pytest.fixture(scope="module")
def tasks_daemon() -> Iterator[Corrald]:
    """The tasks leaf alone, in a process of its own."""
    with Corrald(services=("tasks",)) as corrald:
        corrald.start()
        yield corrald


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory with busybox's commands."""
    return make_rootfs(tmp_path_factory.mktemp("tasks") / "rootfs")


@pytest.fixture
async def tasks(tasks_daemon: Corrald, rootfs: Path) -> AsyncIterator[TaskClient]:
    """A client of the tasks leaf that deletes what it created."""
    async with task_client(tasks_daemon, rootfs) as client:
        yield client
