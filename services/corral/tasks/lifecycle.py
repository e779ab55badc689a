"""The life of tasks and their processes: create, start, signal, wait, delete.

What changes something runs to its end once it has begun, whether or not the caller still waits.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from signal import SIGKILL

import structlog

from corral.kernel.failpoint import failpoint
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, Unavailable, from_os_error
from corral.store import Database, Transaction
from corral.tasks import store
from corral.tasks.bundle import Bundle, Bundles
from corral.tasks.ends import Ends
from corral.tasks.live import JUST_ENDED_S, Process, Task, told
from corral.tasks.model import INIT, Exit, LogRow, ProcessRow, Status, TaskKey, TaskRow
from corral.tasks.recovery import NOT_SEEN, Recovery
from corral.tasks.registry import Registry, uncancelled
from corral.tasks.spawning import UNDO_S, Spawned, Spawner, undo

log = structlog.get_logger()

KILL_S = 10.0
# A shim that is about to hang up, because everything has ended, does so within this.
HANG_UP_S = 0.1
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
    # The shim's too, but to be written down nowhere.
    secrets: dict[str, object] = field(default_factory=dict, repr=False)


class Tasks:
    """Every task of this host."""

    def __init__(
        self,
        registry: Registry,
        database: Database,
        ends: Ends,
        bundles: Bundles,
        spawner: Spawner,
        recovery: Recovery,
    ) -> None:
        self.registry = registry
        self._database = database
        self._ends = ends
        self._bundles = bundles
        self._spawner = spawner
        self._recovery = recovery

    # Making

    @uncancelled
    async def create(self, new: NewTask) -> Task:
        """Make a container that waits for start. Raises AlreadyExists, CorralError; then nothing of it is left."""
        async with self.registry.alone(new.key):
            if new.key in self.registry:
                raise AlreadyExists(f"container {new.key.id} has a task already; delete it first", reason="TASK_EXISTS")
            bundle = self._bundles.of(new.key)
            try:
                spawned = await self._spawn(new, bundle)
            except OSError as e:
                raise from_os_error(e, f"container {new.key.id} cannot be created") from e
            task = self._task(new, spawned, bundle)
            try:
                await self._database.write(lambda transaction: store.insert_task(transaction, task.row, task.init.row))
                failpoint("tasks.create.after_row")
            except BaseException:
                task.close()
                await undo(bundle, timeout_s=UNDO_S)
                raise
            self.registry.add(task)
            self._recovery.follow(task)
            task.keep_streams(INIT)
        log.info("task.created", container_id=new.key.id, pid=task.init.row.pid, shim_pid=task.row.shim_pid)
        return task

    async def _spawn(self, new: NewTask, bundle: Bundle) -> Spawned:
        try:
            return await self._spawn_anew(new, bundle)
        except FileExistsError:
            # No task has it, so it is what a failed undo left.
            await undo(bundle, timeout_s=UNDO_S)
            return await self._spawn_anew(new, bundle)

    async def _spawn_anew(self, new: NewTask, bundle: Bundle) -> Spawned:
        if new.log.path.startswith(f"{bundle.logs}/"):
            await run_blocking(bundle.make_logs)
        return await self._spawner.spawn(bundle, new.config, new.fields | new.secrets)

    def _task(self, new: NewTask, spawned: Spawned, bundle: Bundle) -> Task:
        row = TaskRow(
            key=new.key,
            created_at_ns=time.time_ns(),
            shim_pid=spawned.identity.pid,
            shim_start_time=spawned.identity.start_time,
            create=json.dumps(new.fields),
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
        task = Task(row, bundle, [Process(init)])
        task.shim = spawned.shim
        return task

    @uncancelled
    async def start(self, key: TaskKey, exec_id: str) -> Process:
        """Let a created process run.

        Raises NotFound and PermissionDenied also for a program that cannot be executed.
        """
        task = await self._settled(key)
        process = task.process(exec_id)
        async with process.lock:
            if not process.row.may(Status.RUNNING):
                raise _not_startable(process)
            failpoint("tasks.start.before_shim")
            try:
                shim = task.connected()
                identity = await shim.start(exec_id, on_sent=process.let_go_of_asked) or process.identity
            except CorralError as e:
                failure = e
            else:
                failpoint("tasks.start.after_shim")
                assert identity is not None
                await process.mark_started(self._database, identity, time.time_ns())
                failpoint("tasks.start.after_row")
                if exec_id:
                    task.keep_streams(exec_id)
                return process
        await self.settle_start(task, process, failure)
        return process

    async def settle_start(self, task: Task, process: Process, failure: CorralError) -> None:
        """After a shim refused to start a process, or went away: return if it runs all the same, or has; else raise
        what to tell. To be called without its lock."""
        if isinstance(failure, Unavailable) and await _runs_all_the_same(task, process):
            return
        self.registry.get(task.row.key)  # it may be no more, as its shim was killed before it was started
        await self._not_started(process, failure)
        raise failure if process.row.is_init else await told(failure, task)

    async def _settled(self, key: TaskKey) -> Task:
        """A task with its shim, or whose end is known. Raises NotFound."""
        while True:
            task = self.registry.get(key)
            await task.settled.wait()
            if self.registry.find(key) is task:
                return task

    async def _not_started(self, process: Process, failure: CorralError) -> None:
        """A refused exec has ended without having been; that of init the shim reports itself."""
        if process.row.is_init or isinstance(failure, Unavailable):
            return
        how = not_executed(failure) or Exit(code=_NOT_STARTED, exited_at_ns=time.time_ns(), reason=failure.message)
        await process.mark_ended(self._ends.write, how)

    # While it lives

    async def wait(self, key: TaskKey, exec_id: str) -> Exit:
        """How a process ended, once it has. Raises NotFound."""
        return await self.registry.get(key).process(exec_id).wait()

    async def kill(self, key: TaskKey, exec_id: str, number: int, *, everything: bool) -> None:
        """Send a signal. Raises FailedPrecondition if the process has ended, CorralError."""
        task = self.registry.get(key)
        process = task.process(exec_id)
        if process.ended.is_set():
            raise FailedPrecondition(f"{process.what} is not running: it has ended", reason="NOT_RUNNING")
        try:
            shim = await task.reached()
        except Unavailable:
            if _signal_alone(task, exec_id, number):
                return
            raise
        try:
            await shim.kill(exec_id, number, everything=everything)
        except Unavailable as e:
            if await process.has_ended(within_s=JUST_ENDED_S if shim.is_open else HANG_UP_S):
                raise FailedPrecondition(f"{process.what} is not running: it has ended", reason="NOT_RUNNING") from e
            if shim.is_open:
                raise
            await (await task.reached()).kill(exec_id, number, everything=everything)

    async def resize(self, key: TaskKey, exec_id: str, width: int, height: int) -> None:
        """Raises FailedPrecondition if the process has no terminal, CorralError."""
        task = self.registry.get(key)
        task.process(exec_id)
        await (await task.reached()).resize(exec_id, width, height)

    async def reopen_log(self, key: TaskKey) -> None:
        """Have the log opened again by its name. Raises FailedPrecondition if the task has ended, CorralError."""
        task = self.registry.get(key)
        if task.init.ended.is_set():
            raise FailedPrecondition(f"container {key.id} has ended, and writes no log", reason="NOT_RUNNING")
        await (await task.reached()).reopen_log()

    async def close_stdin(self, key: TaskKey, exec_id: str) -> None:
        """Let a process read the end of its stdin; one that has ended needs nothing. Raises CorralError."""
        task = self.registry.get(key)
        if not task.process(exec_id).ended.is_set():
            task.process(exec_id).let_go("stdin")
            await (await task.reached()).close_stdin(exec_id)

    # Ending

    @uncancelled
    async def delete(self, key: TaskKey, *, force: bool, must_exist: bool) -> Exit | None:
        """Forget a task; returns how it ended.

        Raises FailedPrecondition if it runs and force is not given, NotFound if there is none and must_exist is given.
        """
        async with self.registry.alone(key):
            task = self.registry.get(key) if must_exist else self.registry.find(key)
            if task is None:
                return None
            if task.init.row.status is Status.RUNNING and not force:
                raise FailedPrecondition(
                    f"container {key.id} is running; stop it first, or delete it by force", reason="RUNNING"
                )
            if not task.init.ended.is_set():
                await self._end(task)
            if self.registry.find(key) is not task:  # it had never run, and was forgotten with its shim
                return None
            await self._forget(task)
        log.info("task.deleted", container_id=key.id)
        return task.init.row.exit

    async def _end(self, task: Task) -> None:
        """Kill a task and wait for its exit, so that also this exit is seen and journalled."""
        failpoint("tasks.delete.before_kill")
        try:
            await (await task.reached()).kill(INIT, SIGKILL, everything=True)
        except CorralError as e:
            log.info("task.not_killed", container_id=task.row.key.id, error=str(e))  # it may just have ended
            _signal_alone(task, INIT, SIGKILL)
        if await task.init.has_ended(within_s=KILL_S):
            return
        log.warning("shim.killed", container_id=task.row.key.id, reason="it reported no exit")
        await task.shim_identity.kill(within_s=KILL_S)
        if not await task.init.has_ended(within_s=KILL_S):
            raise Unavailable(f"container {task.row.key.id} cannot be killed", reason="UNKILLABLE")

    async def _forget(self, task: Task) -> None:
        for process in tuple(task.processes.values()):  # also one that is just being registered
            if not process.ended.is_set():  # an exec that died with init, before its shim could tell
                await process.mark_ended(self._ends.write, Exit.unknown(NOT_SEEN, exited_at_ns=time.time_ns()))
        unwritten = [process.row for process in task.processes.values() if not self._ends.is_written(process)]

        def forget(transaction: Transaction) -> None:
            for row in unwritten:
                store.ended(transaction, row)
            store.delete_task(transaction, task.row.key)

        failpoint("tasks.delete.before_row")
        await self._database.write(forget)
        failpoint("tasks.delete.after_row")
        self.registry.remove(task)
        await self._let_go(task)
        task.bundle.discard()
        failpoint("tasks.delete.after_bundle")

    async def _let_go(self, task: Task) -> None:
        """The shim ends by itself, at once unless clients still have to get their output."""
        if task.shim is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(HANG_UP_S):
                    await task.shim.closed.wait()
        task.close()


def not_executed(failure: CorralError) -> Exit | None:
    """What it comes to, if a program could not be executed, and that is all that went wrong."""
    code = _NOT_STARTED_CODES.get(failure.reason)
    return None if code is None else Exit(code=code, exited_at_ns=time.time_ns(), reason=failure.message)


def _not_startable(process: Process) -> FailedPrecondition:
    row = process.row
    if row.exit is not None and not row.exit.known and not row.is_init and row.started_at_ns is None:
        return FailedPrecondition(
            f"{process.what} cannot be started any more: {row.exit.reason}; create it anew", reason="EXEC_LOST"
        )
    return FailedPrecondition(
        f"{process.what} was started already: it is {row.status.name.lower()}", reason="ALREADY_STARTED"
    )


async def _runs_all_the_same(task: Task, process: Process) -> bool:
    """Whether a process runs, or has, though its shim was killed before it could say so."""
    with suppress(TimeoutError):
        async with asyncio.timeout(HANG_UP_S):
            if task.shim is not None:
                await task.shim.closed.wait()
    await task.settled.wait()
    return process.row.started_at_ns is not None


def _signal_alone(task: Task, exec_id: str, number: int) -> bool:
    """To a container whose shims keep dying: whether its init was there."""
    init = task.init.identity
    return task.shim is None and exec_id == INIT and init is not None and init.signal(number)
