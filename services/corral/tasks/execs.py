"""Further processes in a running container, from their registration until they are forgotten.

They are started, signalled and waited for as init is: see lifecycle.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from signal import SIGKILL

from corral.kernel.failpoint import failpoint
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, NotFound, Unavailable
from corral.shim.wire import Message
from corral.store import Database, Referenced
from corral.tasks import store
from corral.tasks.live import Process, Task, told
from corral.tasks.model import Exit, ProcessRow, Status, TaskKey
from corral.tasks.registry import Registry, uncancelled

KILL_S = 10.0


@dataclass(frozen=True, slots=True)
class NewExec:
    """One more process: an OCI process object, and the shim's further fields (user, stdin)."""

    exec_id: str
    process: Mapping[str, object]
    fields: dict[str, object]
    args: tuple[str, ...]
    terminal: bool
    stdin: bool


class Execs:
    """The execs of all tasks."""

    def __init__(self, registry: Registry, database: Database) -> None:
        self.registry = registry
        self._database = database

    async def running(self, key: TaskKey) -> Task:
        """A task that runs. Raises NotFound, FailedPrecondition."""
        task = self.registry.get(key)
        await task.settled.wait()
        if task.init.row.status is not Status.RUNNING:
            raise FailedPrecondition(
                f"container {key.id} is not running: {task.init.row.status.name.lower()}", reason="NOT_RUNNING"
            )
        return task

    @uncancelled
    async def create(self, key: TaskKey, new: NewExec) -> None:
        """Register a process.

        Raises NotFound, AlreadyExists, FailedPrecondition if the task does not run, CorralError.
        """
        task = await self.running(key)
        process = self.add(task, new)
        try:
            async with process.lock:
                await self._register(task, new, process)
        except BaseException as e:
            task.unmake(process)
            if isinstance(e, CorralError | Referenced):
                raise await told(e, task) from e
            raise

    def add(self, task: Task, new: NewExec) -> Process:
        """One that is in no row yet. Raises AlreadyExists."""
        key = task.row.key
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
        return process

    async def _register(self, task: Task, new: NewExec, process: Process) -> None:
        shim, row = task.connected(), process.row
        asked: Message = {**new.fields, "process": {**await task.inherited(), **new.process}}
        await shim.exec(new.exec_id, asked)
        process.asked = asked
        failpoint("tasks.exec.after_shim")
        try:
            await self._database.write(lambda transaction: store.insert_exec(transaction, row))
        except BaseException:
            with suppress(CorralError):
                await shim.delete_exec(new.exec_id)
            raise
        failpoint("tasks.exec.after_row")

    @uncancelled
    async def delete(self, key: TaskKey, exec_id: str, *, force: bool) -> None:
        """Forget an exec; one that is not there is fine.

        Raises FailedPrecondition if it runs and force is not given.
        """
        task = self.registry.find(key)
        process = None if task is None else task.processes.get(exec_id)
        if task is None or process is None or process.row.is_init:
            return
        await self._delete(task, process, force=force)

    async def _delete(self, task: Task, process: Process, *, force: bool) -> None:
        exec_id = process.row.exec_id
        if process.row.status is Status.RUNNING:
            await self._end(task, process, force=force)
        async with process.lock:
            if task.processes.get(exec_id) is not process:
                return
            if task.shim is not None:
                with suppress(NotFound, Unavailable):
                    await task.shim.delete_exec(exec_id)
            failpoint("tasks.delete_exec.after_shim")
            if process.row.forget:  # which the next start would do
                self._database.write_soon(lambda transaction: store.delete_exec(transaction, process.row))
            else:
                await self._database.write(lambda transaction: store.delete_exec(transaction, process.row))
            del task.processes[exec_id]
            process.let_go()
        if not process.ended.is_set():
            # It was never started; whoever waits for it would wait for ever.
            process.release(Exit.unknown("deleted before it was started", exited_at_ns=time.time_ns()))

    def forget_once_unused(self, task: Task, process: Process) -> None:
        """Delete it in the background, once it has ended and no client is attached, or will be back to its attachment.

        Its start writes that down.
        """
        process.row = replace(process.row, forget=True)
        process.on_unused = lambda: self.registry.in_background(self._delete(task, process, force=False))
        process.look_unused()

    def forget_unused(self) -> None:
        """The same for those of which an earlier program has written it down."""
        for task in self.registry.of(None):
            for process in tuple(task.processes.values()):
                if process.row.forget:
                    self.forget_once_unused(task, process)

    async def _end(self, task: Task, process: Process, *, force: bool) -> None:
        if not force:
            raise FailedPrecondition(f"{process.what} is running; kill it first", reason="RUNNING")
        with suppress(FailedPrecondition):  # it has just ended
            await (await task.reached()).kill(process.row.exec_id, SIGKILL, everything=False)
        try:
            async with asyncio.timeout(KILL_S):
                await process.ended.wait()
        except TimeoutError as e:
            raise Unavailable(f"{process.what} cannot be killed", reason="UNKILLABLE") from e
