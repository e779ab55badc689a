"""The life of tasks: create, start, exec, kill, delete; who waits for them; and what is done at start-up.

What changes something runs to its end once it has begun, whether or not the caller still waits (see `uncancelled`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from signal import SIGKILL
from typing import Any, Concatenate

import structlog

from corral.kernel.failpoint import failpoint
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import (
    AlreadyExists,
    CorralError,
    FailedPrecondition,
    Internal,
    NotFound,
    Unavailable,
)
from corral.store import Database, Transaction
from corral.tasks import store
from corral.tasks.bundle import Bundles
from corral.tasks.identity import Identity
from corral.tasks.live import Process, Task
from corral.tasks.model import INIT, Exit, LogRow, ProcessRow, Status, TaskKey, TaskRow
from corral.tasks.recovery import Recovery
from corral.tasks.spawning import UNDO_S, Spawned, Spawner, undo

log = structlog.get_logger()

KILL_S = 10.0
PARALLEL_RECOVERIES = 32
# What a shim's refusal to start means as an exit code, as docker has it.
_NOT_STARTED_CODES: Mapping[str, int] = {"EXEC_NOT_FOUND": 127, "EXEC_DENIED": 126}
_NOT_STARTED = 128


@dataclass(frozen=True, slots=True)
class NewTask:
    """What a task is made of. `fields` are the shim's: rootfs, user, stdin, console_size, log, cgroup."""

    key: TaskKey
    config: bytes
    fields: dict[str, object]
    args: tuple[str, ...]
    terminal: bool
    stdin: bool
    stdin_once: bool
    log: LogRow
    cgroup_paths: tuple[str, ...]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NewExec:
    """One more process: an OCI process object, and the shim's further fields (user, stdin)."""

    exec_id: str
    process: dict[str, object]
    fields: dict[str, object]
    args: tuple[str, ...]
    terminal: bool
    stdin: bool


def uncancelled[**P, T](
    method: Callable[Concatenate["Tasks", P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Tasks", P], Coroutine[Any, Any, T]]:
    """The method goes on when its caller is cancelled: half of a change must never be left."""

    async def shielded(self: "Tasks", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.shield(self.in_background(method(self, *args, **kwargs)))

    shielded.__doc__ = method.__doc__
    return shielded


class Tasks:
    """Every task of this host."""

    def __init__(self, database: Database, bundles: Bundles, spawner: Spawner, recovery: Recovery) -> None:
        self._database = database
        self._bundles = bundles
        self._spawner = spawner
        self._recovery = recovery
        self._tasks: dict[TaskKey, Task] = {}
        self._locks: dict[TaskKey, tuple[asyncio.Lock, int]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._stopping = False

    # Looking

    def get(self, key: TaskKey) -> Task:
        """Raises NotFound."""
        task = self._tasks.get(key)
        if task is None:
            raise NotFound(f"no container {key.id} has a task: it was never started here, or deleted", reason="NO_TASK")
        return task

    def list(self, namespace: str | None) -> list[Task]:
        """Those of a namespace, or all."""
        return [task for key, task in self._tasks.items() if namespace in (None, key.namespace)]

    async def wait(self, key: TaskKey, exec_id: str) -> Exit:
        """How a process ended, once it has. Raises NotFound."""
        return await self.get(key).process(exec_id).wait()

    # Making

    @uncancelled
    async def create(self, new: NewTask) -> Task:
        """Make a container that waits for start. Raises AlreadyExists, CorralError; then nothing of it is left."""
        async with self._alone(new.key):
            if new.key in self._tasks:
                raise AlreadyExists(f"container {new.key.id} has a task already; delete it first", reason="TASK_EXISTS")
            bundle = self._bundles.of(new.key)
            try:
                spawned = await self._spawner.spawn(bundle, new.config, new.fields)
            except FileExistsError as e:
                raise Internal(
                    f"{bundle.path} exists but no task does; restart corral to have it cleaned up",
                    reason="STRAY_BUNDLE",
                ) from e
            task = self._task(new, spawned)
            try:
                await self._database.write(lambda transaction: store.insert_task(transaction, task.row, task.init.row))
                failpoint("tasks.create.after_row")
            except BaseException:
                task.close()
                await undo(bundle, timeout_s=UNDO_S)
                raise
            self._tasks[new.key] = task
            self._follow(task)
            return task

    def _task(self, new: NewTask, spawned: Spawned) -> Task:
        row = TaskRow(
            key=new.key,
            created_at_ns=time.time_ns(),
            shim_pid=spawned.identity.pid,
            shim_start_time=spawned.identity.start_time,
            log=new.log,
            cgroup_paths=new.cgroup_paths,
            labels=new.labels,
        )
        init = ProcessRow(
            task=new.key,
            exec_id=INIT,
            pid=spawned.init.pid,
            start_time=spawned.init.start_time,
            args=new.args,
            terminal=new.terminal,
            stdin=new.stdin,
            stdin_once=new.stdin_once,
        )
        task = Task(row, self._bundles.of(new.key), [Process(init)])
        task.shim = spawned.shim
        return task

    @uncancelled
    async def exec(self, key: TaskKey, new: NewExec) -> None:
        """Register a process.

        Raises NotFound, AlreadyExists, FailedPrecondition if the task does not run, CorralError.
        """
        task = self.get(key)
        if task.init.row.status is not Status.RUNNING:
            raise FailedPrecondition(
                f"container {key.id} is not running: {task.init.row.status.name.lower()}", reason="NOT_RUNNING"
            )
        if new.exec_id in task.processes:
            raise AlreadyExists(f"container {key.id} has an exec {new.exec_id!r} already", reason="EXEC_EXISTS")
        row = ProcessRow(
            task=key,
            exec_id=new.exec_id,
            args=new.args,
            terminal=new.terminal,
            stdin=new.stdin,
            stdin_once=True,
        )
        process = task.processes[new.exec_id] = Process(row)
        async with process.lock:
            try:
                shim = task.connected()
                await shim.exec(new.exec_id, {**new.fields, "process": await task.inherited() | new.process})
                failpoint("tasks.exec.after_shim")
                try:
                    await self._database.write(lambda transaction: store.insert_exec(transaction, row))
                except BaseException:
                    with suppress(CorralError):
                        await shim.delete_exec(new.exec_id)
                    raise
                failpoint("tasks.exec.after_row")
            except BaseException:
                del task.processes[new.exec_id]
                raise

    @uncancelled
    async def start(self, key: TaskKey, exec_id: str) -> Process:
        """Let a created process run.

        Raises NotFound and PermissionDenied also for a program that cannot be executed.
        """
        task = self.get(key)
        process = task.process(exec_id)
        async with process.lock:
            if not process.row.may(Status.RUNNING):
                raise FailedPrecondition(
                    f"{_what(process)} was started already: it is {process.row.status.name.lower()}",
                    reason="ALREADY_STARTED",
                )
            failpoint("tasks.start.before_shim")
            try:
                identity = await task.connected().start(exec_id) or process.identity
            except CorralError as e:
                failure = e
            else:
                failpoint("tasks.start.after_shim")
                assert identity is not None
                await process.mark_started(self._database, identity, time.time_ns())
                failpoint("tasks.start.after_row")
                return process
        await self._not_started(process, failure)
        raise failure

    async def _not_started(self, process: Process, failure: CorralError) -> None:
        """A refused exec has ended without having been; that of init the shim reports itself."""
        if process.row.is_init or isinstance(failure, Unavailable):
            return
        code = _NOT_STARTED_CODES.get(failure.reason, _NOT_STARTED)
        how = Exit(code=code, exited_at_ns=time.time_ns(), reason=failure.message)
        await process.mark_ended(self._database, how)

    # Ending

    async def kill(self, key: TaskKey, exec_id: str, number: int, *, everything: bool) -> None:
        """Send a signal. Raises FailedPrecondition if the process has ended, CorralError."""
        task = self.get(key)
        process = task.process(exec_id)
        if process.ended.is_set():
            raise FailedPrecondition(f"{_what(process)} is not running: it has ended", reason="NOT_RUNNING")
        await task.connected().kill(exec_id, number, everything=everything)

    async def resize(self, key: TaskKey, exec_id: str, width: int, height: int) -> None:
        """Raises FailedPrecondition if the process has no terminal, CorralError."""
        task = self.get(key)
        task.process(exec_id)
        await task.connected().resize(exec_id, width, height)

    async def close_stdin(self, key: TaskKey, exec_id: str) -> None:
        """Let a process read the end of its stdin; one that has ended needs nothing. Raises CorralError."""
        task = self.get(key)
        if not task.process(exec_id).ended.is_set():
            await task.connected().close_stdin(exec_id)

    @uncancelled
    async def delete(self, key: TaskKey, *, force: bool, must_exist: bool) -> Exit | None:
        """Forget a task; returns how it ended.

        Raises FailedPrecondition if it runs and force is not given, NotFound if there is none and must_exist is given.
        """
        async with self._alone(key):
            task = self._tasks.get(key)
            if task is None:
                if must_exist:
                    self.get(key)
                return None
            if task.init.row.status is Status.RUNNING and not force:
                raise FailedPrecondition(
                    f"container {key.id} is running; stop it first, or delete it by force", reason="RUNNING"
                )
            if not task.init.ended.is_set():
                await self._end(task)
            await self._forget(task)
            return task.init.row.exit

    async def _end(self, task: Task) -> None:
        """Kill a task and wait for its exit, so that also this exit is seen and journalled."""
        failpoint("tasks.delete.before_kill")
        try:
            await task.connected().kill(INIT, SIGKILL, everything=True)
        except CorralError as e:
            log.info("task.kill_failed", container_id=task.row.key.id, error=str(e))  # it may just have ended
        for last_resort in (False, True):
            if last_resort:
                log.warning("shim.killed", container_id=task.row.key.id, why="it reported no exit")
                await task.shim_identity.kill(within_s=KILL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(KILL_S):
                    await task.init.ended.wait()
                return
        raise Unavailable(f"container {task.row.key.id} cannot be killed", reason="UNKILLABLE")

    async def _forget(self, task: Task) -> None:
        key = task.row.key
        # Execs that died with init may not have been reported yet.
        rows = [process.row for process in task.processes.values()]

        def forget(transaction: Transaction) -> None:
            for row in rows:
                if row.exit is not None:
                    store.ended(transaction, row)  # in case its first writing failed
            store.delete_task(transaction, key)

        failpoint("tasks.delete.before_row")
        await self._database.write(forget)
        failpoint("tasks.delete.after_row")
        del self._tasks[key]
        task.close()
        await run_blocking(task.bundle.remove)
        failpoint("tasks.delete.after_bundle")

    @uncancelled
    async def delete_exec(self, key: TaskKey, exec_id: str, *, force: bool) -> None:
        """Forget an exec; one that is not there is fine.

        Raises FailedPrecondition if it runs and force is not given.
        """
        task = self._tasks.get(key)
        process = None if task is None else task.processes.get(exec_id)
        if task is None or process is None or process.row.is_init:
            return
        if process.row.status is Status.RUNNING:
            if not force:
                raise FailedPrecondition(f"{_what(process)} is running; kill it first", reason="RUNNING")
            await task.connected().kill(exec_id, SIGKILL, everything=False)
            async with asyncio.timeout(KILL_S):
                await process.ended.wait()
        async with process.lock:
            if task.processes.get(exec_id) is not process:
                return
            if task.shim is not None:
                with suppress(NotFound, Unavailable):
                    await task.shim.delete_exec(exec_id)
            failpoint("tasks.delete_exec.after_shim")
            await self._database.write(lambda transaction: store.delete_exec(transaction, process.row))
            del task.processes[exec_id]
        if not process.ended.is_set():  # it was never started, and whoever waits for it would wait for ever
            process.row = process.row.ended(Exit.unknown("deleted before it was started", exited_at_ns=time.time_ns()))
            process.ended.set()

    # Watching

    def _follow(self, task: Task) -> None:
        shim = task.shim
        assert shim is not None

        def exited(exec_id: str, how: Exit) -> None:
            process = task.processes.get(exec_id)
            if process is not None:
                self.in_background(process.mark_ended(self._database, how))

        shim.follow(exited, lambda: None if self._stopping else self._lost(task))

    def _lost(self, task: Task) -> None:
        """The shim hung up: as a rule because everything has ended, which was reported before."""
        task.shim = None
        self.in_background(self._recover(task))

    async def _recover(self, task: Task) -> None:
        async with task.init.lock:  # an exit that was reported is being written
            pass
        if all(process.ended.is_set() for process in task.processes.values()):
            return
        shim = await self._recovery.adopt(task)
        if shim is None:
            await self._recovery.settle(task)
            return
        task.shim = shim
        self._follow(task)

    def in_background[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run to the end, also when nobody awaits it; stop() waits for it."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (e := task.exception()) is not None and not isinstance(e, CorralError):
            log.error("tasks.background_failed", exc_info=e)

    @asynccontextmanager
    async def _alone(self, key: TaskKey) -> AsyncIterator[None]:
        """One creation or deletion of a task at a time."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = lock, users - 1

    # Beginning and end of this process

    async def recover(self) -> None:
        """Take over what an earlier process left. Nothing else may be called before this is done."""
        stored = self._database.read_sync(store.load)
        for entry in stored:
            bundle = self._bundles.of(entry.task.key)
            self._tasks[entry.task.key] = Task(entry.task, bundle, [Process(row) for row in entry.processes])
        strays = await run_blocking(self._bundles.found) - self._tasks.keys()
        turn = asyncio.Semaphore(PARALLEL_RECOVERIES)

        async def in_turn(work: Coroutine[Any, Any, None]) -> None:
            async with turn:
                await work

        async with asyncio.TaskGroup() as group:
            for task in list(self._tasks.values()):
                group.create_task(in_turn(self._recover(task)))
            for key in strays:
                group.create_task(in_turn(self._remove_stray(key)))
        lost = sum(1 for task in self._tasks.values() if task.init.row.exit and not task.init.row.exit.known)
        log.info("tasks.recovered", tasks=len(self._tasks), lost=lost, removed=len(strays))

    async def _remove_stray(self, key: TaskKey) -> None:
        """A creation that was cut short, or a deletion that has only its files left to remove."""
        try:
            await undo(self._bundles.of(key), timeout_s=UNDO_S)
        except (CorralError, OSError) as e:
            log.error("bundle.not_removed", namespace=key.namespace, container_id=key.id, error=str(e))

    async def stop(self) -> None:
        """Finish what has begun and hang up; containers go on."""
        self._stopping = True
        while self._background:
            await asyncio.wait(self._background)
        for task in self._tasks.values():
            task.close()


def _what(process: Process) -> str:
    row = process.row
    return f"container {row.task.id}" if row.is_init else f"exec {row.exec_id!r} of container {row.task.id}"


__all__ = ["Identity", "NewExec", "NewTask", "Tasks"]
