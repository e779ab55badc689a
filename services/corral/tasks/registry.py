"""Every task that this process knows, who may change one, and the work that nobody may interrupt."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Concatenate, Protocol

import structlog

from corral.rpc.errors import CorralError, NotFound
from corral.rpc.lasting import lasting
from corral.tasks.live import Process, Task
from corral.tasks.model import TaskKey

log = structlog.get_logger()

STOP_S = 10.0


class Registry:
    """Tasks by key. A task is in it from when its row was written until its row is gone."""

    def __init__(self) -> None:
        self._tasks: dict[TaskKey, Task] = {}
        self._locks: dict[TaskKey, tuple[asyncio.Lock, int]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._until_stopped: set[asyncio.Task[Any]] = set()
        self.is_stopping = False

    def __contains__(self, key: TaskKey) -> bool:
        return key in self._tasks

    def find(self, key: TaskKey) -> Task | None:
        """The task, or None."""
        return self._tasks.get(key)

    def get(self, key: TaskKey) -> Task:
        """Raises NotFound."""
        task = self._tasks.get(key)
        if task is None:
            raise NotFound(f"no container {key.id} has a task: it was never started here, or deleted", reason="NO_TASK")
        return task

    def of(self, namespace: str | None) -> Iterable[Task]:
        """Those of a namespace, or all."""
        return [task for key, task in self._tasks.items() if namespace in (None, key.namespace)]

    def has(self, process: Process) -> bool:
        """Whether it is one of a task that is here."""
        task = self.find(process.row.task)
        return task is not None and task.processes.get(process.row.exec_id) is process

    def add(self, task: Task) -> None:
        self._tasks[task.row.key] = task

    def remove(self, task: Task) -> None:
        del self._tasks[task.row.key]

    @asynccontextmanager
    async def alone(self, key: TaskKey) -> AsyncIterator[None]:
        """One creation or deletion of a task at a time."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(key)
            if users > 1:
                self._locks[key] = lock, users - 1

    def in_background[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run to the end, also when nobody awaits it; stop() waits for it. It begins at once."""
        task = asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)
        self._background.add(task)
        task.add_done_callback(self._done)
        return task

    def until_stopped(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run beside all else; stop() ends it where it is."""
        task = asyncio.create_task(work)
        self._until_stopped.add(task)
        task.add_done_callback(self._until_stopped.discard)
        task.add_done_callback(self._done)
        if self.is_stopping:
            task.cancel()
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if task.cancelled() or (e := task.exception()) is None or isinstance(e, CorralError):
            return
        if isinstance(e, OSError):  # a full disk, say, which is no bug
            log.error("tasks.work_failed", error=str(e))
        else:
            log.error("tasks.work_failed", exc_info=e)

    async def stop(self) -> None:
        """Finish what has begun and hang up; containers go on.

        What takes longer than STOP_S is left as a crash would leave it, for the next start.
        """
        self.is_stopping = True
        for work in self._until_stopped:
            work.cancel()
        deadline = asyncio.get_running_loop().time() + STOP_S
        while (left := self._background | self._until_stopped) and (
            left_s := deadline - asyncio.get_running_loop().time()
        ) > 0:
            await asyncio.wait(left, timeout=left_s)
        for task in self._tasks.values():
            task.close()


class _HasRegistry(Protocol):
    @property
    def registry(self) -> Registry: ...


def uncancelled[S: _HasRegistry, **P, T](
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """The method goes on when its caller is cancelled: half of a change must never be left."""

    async def shielded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await lasting(method(self, *args, **kwargs), self.registry.in_background)

    shielded.__doc__ = method.__doc__
    return shielded
