"""Execs that are made, attached to and started by one request to their shim, for a client that stays for their end.

Each step of these could be asked for alone (execs, attach, lifecycle). Here the row comes first: so at any moment that
this service is killed in, the next one finds the exec described, and asks the shim how far it got.
"""

import asyncio
import time

from corral.kernel.failpoint import failpoint
from corral.rpc.errors import CorralError, Unavailable
from corral.shim.wire import Message, close_all
from corral.store import Database, Referenced
from corral.tasks import store
from corral.tasks.attach import Attachment, Wanted
from corral.tasks.execs import Execs, NewExec
from corral.tasks.lifecycle import Tasks
from corral.tasks.live import Process, Task, told
from corral.tasks.model import TaskKey
from corral.tasks.shim import Shim


class Runs:
    """Begins them in all tasks."""

    def __init__(self, tasks: Tasks, execs: Execs, database: Database) -> None:
        self._tasks = tasks
        self._execs = execs
        self._database = database

    async def begin(self, key: TaskKey, new: NewExec, wanted: Wanted) -> tuple[Task, Process, Attachment]:
        """One that runs, and its client; it is forgotten once it has ended and that has left.

        Raises as Execs.create() and Tasks.start(). What has begun goes on without its caller, as a change does.
        """
        beginning = self._tasks.registry.in_background(self._begin(key, new, wanted))
        try:
            return await asyncio.shield(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(_leave)
            raise

    async def _begin(self, key: TaskKey, new: NewExec, wanted: Wanted) -> tuple[Task, Process, Attachment]:
        task = await self._execs.running(key)
        asked: Message = {**new.fields, "process": {**await task.inherited(), **new.process}, "start": True}
        process = self._execs.add(task, new)
        self._execs.forget_once_unused(task, process)
        attachment = Attachment(task, process, wanted)
        try:
            failure = await self._ask(task, process, attachment, asked)
            if failure is not None:
                await self._tasks.settle_start(task, process, failure)
            elif process.row.started_at_ns is None:  # an older shim has but registered it
                await attachment.attach()
                await self._tasks.start(key, new.exec_id)
        except BaseException:
            attachment.close()
            raise
        return task, process, attachment

    async def _ask(self, task: Task, process: Process, attachment: Attachment, asked: Message) -> CorralError | None:
        """What went wrong, if it did not begin as far as its shim knows."""
        try:
            async with process.lock:
                shim, fields, fds = await self._describe(task, process, attachment)
                return await self._start(shim, process, {**asked, "attach": fields}, fds)
        except (Unavailable, Referenced) as e:
            raise await told(e, task) from e

    async def _describe(self, task: Task, process: Process, attachment: Attachment) -> tuple[Shim, Message, list[int]]:
        """Have it in a row, and at hand what its shim is to know of its client. After an error it is not there."""
        row = process.row
        fds: list[int] = []
        try:
            shim, fields, fds = attachment.made()
            await self._database.write(lambda transaction: store.insert_exec(transaction, row))
        except BaseException:
            close_all(fds)
            task.unmake(process)
            raise
        failpoint("tasks.exec.after_row")
        return shim, fields, fds

    async def _start(self, shim: Shim, process: Process, asked: Message, fds: list[int]) -> CorralError | None:
        try:
            begun = await shim.exec(process.row.exec_id, asked, fds)
        except CorralError as e:
            return e
        failpoint("tasks.exec.after_shim")
        if begun.identity is not None:
            if begun.streams is None:  # it had more to send than was read
                shim.streams(process.row.exec_id, process.keep)
            else:
                process.keep(begun.streams)
            process.note_started(self._database, begun.identity, time.time_ns())
        return None


def _leave(beginning: asyncio.Task[tuple[Task, Process, Attachment]]) -> None:
    """Nobody is there to use what has begun."""
    if not beginning.cancelled() and beginning.exception() is None:
        _, _, attachment = beginning.result()
        attachment.close()
