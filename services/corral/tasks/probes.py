"""Processes that are run to their end, for their exit and the beginning of their output: health checks, say.

They come again and again, so one costs its shim one request and this service one transaction. Nobody can attach to it,
wait for it or find it again: it is in no row, and ends with whoever asked for it, its shim or the connection to that.
Of one whose end was not seen the journal has nothing.

A shim that an earlier version has started does not know how to: there it is an exec as any other.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from signal import SIGKILL
from typing import Any

import structlog

from corral.rpc.errors import CorralError, Unavailable, Unimplemented
from corral.shim.wire import Message
from corral.store import Database
from corral.tasks import store
from corral.tasks.attach import Attachment, Wanted
from corral.tasks.execs import Execs, NewExec
from corral.tasks.lifecycle import Tasks, not_executed
from corral.tasks.live import JUST_ENDED_S, Task, has_ended, told
from corral.tasks.model import Exit, ProcessRow, TaskKey
from corral.tasks.shim import Ran, Shim

log = structlog.get_logger()

_OUTPUT = Wanted(stdin=False, stdout=True, stderr=True, lossless=False, replay=False)


@dataclass(frozen=True, slots=True)
class NewProbe:
    """A process, how long it has (0: for ever), and how much of its output is wanted."""

    process: NewExec
    timeout_ns: int
    output_bytes: int

    @property
    def timeout_s(self) -> float | None:
        return self.timeout_ns / 1e9 or None


class Probes:
    """Runs them in all tasks."""

    def __init__(self, tasks: Tasks, execs: Execs, database: Database) -> None:
        self._tasks = tasks
        self._execs = execs
        self._database = database
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, key: TaskKey, probe: NewProbe) -> Ran:
        """How it ended, once it has. Raises as Execs.create() and Tasks.start(), and Unavailable.

        Unavailable also while the task is not settled: a wait for its shim would look as if the probe took long.
        FailedPrecondition also if it ended with its container, which says nothing of it.
        """
        if not self._tasks.registry.get(key).settled.is_set():
            raise Unavailable(f"the shim of container {key.id} is not there yet", reason="NOT_SETTLED")
        task = await self._execs.running(key)
        ran = await self._ran(task, probe)
        how = ran.exit
        was_killed = how.signal == SIGKILL and not how.timed_out and not how.oom
        if was_killed and await task.init.has_ended(within_s=JUST_ENDED_S):  # the kernel ends init last
            raise has_ended(task)
        return ran

    async def _ran(self, task: Task, probe: NewProbe) -> Ran:
        shim = task.connected()
        if shim.runs:
            new = probe.process
            asked: Message = {**new.fields, "process": {**await task.inherited(), **new.process}}
            try:
                return await self._to_its_end(
                    self._run(task, shim, probe, asked), lambda: shim.kill(new.exec_id, SIGKILL, everything=False)
                )
            except Unimplemented:
                shim.runs = False
        key, exec_id = task.row.key, probe.process.exec_id
        return await self._to_its_end(self._by_steps(task, probe), lambda: self._execs.delete(key, exec_id, force=True))

    async def _to_its_end(self, work: Coroutine[Any, Any, Ran], end: Callable[[], Coroutine[Any, Any, None]]) -> Ran:
        """Also if nobody waits for it any more, which is then end()ed: it is journalled all the same."""
        running = self._begin(work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._begin(end())
            raise

    def _begin[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        running = asyncio.create_task(work)
        self._running.add(running)
        running.add_done_callback(self._ended)
        return running

    def _ended(self, running: asyncio.Task[Any]) -> None:
        self._running.discard(running)
        if not running.cancelled():
            running.exception()  # whoever waits is told of it

    async def _run(self, task: Task, shim: Shim, probe: NewProbe, asked: Message) -> Ran:
        new = probe.process
        row = ProcessRow(task=task.row.key, exec_id=new.exec_id, args=new.args)
        try:
            ran = await shim.run(new.exec_id, asked, timeout_ns=probe.timeout_ns, output_bytes=probe.output_bytes)
        except CorralError as e:
            if (how := not_executed(e)) is not None:
                await self._write(task, row, how)
            raise await told(e, task) from e
        if ran.identity is not None:
            at_ns = ran.exit.started_at_ns or ran.exit.exited_at_ns
            row = row.started(pid=ran.identity.pid, start_time=ran.identity.start_time, at_ns=at_ns)
        await self._write(task, row, ran.exit)
        return ran

    async def _write(self, task: Task, row: ProcessRow, how: Exit) -> None:
        if self._tasks.registry.find(row.task) is not task:  # nothing is told of a task after its end
            return
        try:
            await self._database.write(partial(store.ran, process=row, how=how))
        except OSError as e:  # a full disk, say: what is true is told all the same
            log.error("probe.not_written", container_id=row.task.id, exec_id=row.exec_id, error=str(e))

    async def _by_steps(self, task: Task, probe: NewProbe) -> Ran:
        key, exec_id = task.row.key, probe.process.exec_id
        await self._execs.create(key, probe.process)
        process = task.process(exec_id)
        output = bytearray()
        try:
            with await Attachment.open(task, process, _OUTPUT) as attachment:
                await self._tasks.start(key, exec_id)
                async with asyncio.timeout(probe.timeout_s):
                    async for _, data in attachment.output():
                        output += data[: probe.output_bytes - len(output)]
                    how = await process.wait()
        except TimeoutError:
            await self._execs.delete(key, exec_id, force=True)
            how = replace(await process.wait(), timed_out=True)
        finally:
            with suppress(CorralError):
                await self._execs.delete(key, exec_id, force=True)
        return Ran(process.identity, how, output.decode("utf-8", "replace"))
