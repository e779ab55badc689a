"""Tasks as they live in this process: the rows, who waits for them, and the connection to the shim."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from corral.kernel.failpoint import failpoint
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, FailedPrecondition, NotFound, Unavailable
from corral.shim.requests import PIDFD
from corral.shim.wire import Message
from corral.store import Database, Referenced, Transaction
from corral.tasks import store
from corral.tasks.bundle import Bundle
from corral.tasks.happening import Happening
from corral.tasks.identity import Identity
from corral.tasks.model import INIT, Exit, ProcessRow, Status, TaskRow
from corral.tasks.shim import Shim

log = structlog.get_logger()

JUST_ENDED_S = 2.0
STDIN = "stdin"
"""Among a process's streams: the writing end of its standard input."""
OF_ONE_PROCESS = frozenset({"args", "terminal", "consoleSize"})

type Writing = Callable[[Transaction], None]
type EndWriter = Callable[["Process", Writing], Awaitable[None]]


def _nothing() -> None:
    """It is kept."""


class Process:
    """One process: its row as it is now, and its end, which any number may wait for.

    The row is written under the lock, so that moves reach the database in the order in which they happened.
    streams: copies of what its shim has open of it, for the shim that may have to come after that.
    attached: the clients that are, and those that will be back; on_unused is called when it has ended and none is left.
    asked: what its shim was told of an exec that nobody has tried to start, for another one; it may hold secrets, so it
    is in no row, and gone with this service.
    """

    __slots__ = (
        "asked",
        "attached",
        "ended",
        "forgotten",
        "lock",
        "on_stdin_close",
        "on_unused",
        "row",
        "streams",
        "takes_no_input",
    )

    def __init__(self, row: ProcessRow) -> None:
        self.row = row
        self.streams: dict[str, int] = {}
        self.takes_no_input = False
        self.asked: Message | None = None
        self.on_stdin_close: set[Callable[[], None]] = set()
        self.attached: set[object] = set()
        self.on_unused: Callable[[], object] = _nothing
        self.lock = asyncio.Lock()
        self.ended = Happening()
        self.forgotten: CorralError | None = None
        if row.status is Status.STOPPED:
            self.ended.set()

    @property
    def identity(self) -> Identity | None:
        return Identity(self.row.pid, self.row.start_time) if self.row.pid else None

    @property
    def what(self) -> str:
        """For sentences."""
        init = f"container {self.row.task.id}"
        return init if self.row.is_init else f"exec {self.row.exec_id!r} of {init}"

    @property
    def facts(self) -> dict[str, str]:
        """For the log."""
        facts = {"namespace": self.row.task.namespace, "container_id": self.row.task.id}
        return facts if self.row.is_init else {**facts, "exec_id": self.row.exec_id}

    def keep(self, streams: dict[str, int]) -> None:
        """Own these copies of its streams, until it has ended."""
        self.let_go()
        self.streams = streams
        if self.takes_no_input:  # told before we came to take these
            self.let_go(STDIN)
        if self.ended.is_set():
            self.let_go()
        elif self.row.stdin and not self.row.terminal and STDIN not in streams:
            self.stdin_closed()

    def hold(self) -> None:
        """Own a pidfd of it if nothing else is kept yet: how it ends is known then, whoever reaps it."""
        if self.streams or self.identity is None or self.ended.is_set():
            return
        with self.identity.held() as pidfd:
            if pidfd is not None:
                self.streams = {PIDFD: os.dup(pidfd)}

    @property
    def is_attended(self) -> bool:
        """Whether copies of its output are among what is kept of it."""
        return bool(self.streams.keys() - {PIDFD})

    def stdin_closed(self) -> None:
        """It takes no more input."""
        self.takes_no_input = True
        self.let_go(STDIN)
        for tell in tuple(self.on_stdin_close):
            tell()

    def let_go_of_asked(self) -> None:
        """Somebody tries to start it: no other shim may do that once more."""
        self.asked = None

    def look_unused(self) -> None:
        """To be called when it has ended, and when a client has left."""
        if self.ended.is_set() and not self.attached:
            self.on_unused()

    def let_go(self, *names: str) -> None:
        """Close copies of streams: those named, or all."""
        for name in names or tuple(self.streams):
            fd = self.streams.pop(name, None)
            if fd is not None:
                os.close(fd)

    async def wait(self) -> Exit:
        """How it ended, once it has. Raises Unavailable if it never ran, and is no more."""
        await self.ended.wait()
        if self.forgotten is not None:
            raise self.forgotten
        assert self.row.exit is not None
        return self.row.exit

    async def has_ended(self, *, within_s: float) -> bool:
        """Wait for its end, but not for long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.ended.wait()
        return self.ended.is_set()

    def release(self, how: Exit) -> None:
        """Nothing is written any more; whoever waits is told this."""
        self.row = self.row.ended(how)
        self.ended.set()
        self.let_go()

    def forget(self, why: CorralError) -> None:
        """It never ran, and never will; whoever waits is told so."""
        self.forgotten = why
        self.ended.set()
        self.let_go()

    async def mark_started(self, database: Database, identity: Identity, at_ns: int) -> None:
        """It runs. The caller holds the lock."""
        if not self.row.may(Status.RUNNING):
            return
        row = self._has_started(identity, at_ns)
        await database.write(lambda transaction: store.started(transaction, row))

    def note_started(self, database: Database, identity: Identity, at_ns: int) -> None:
        """The same of one whose shim and zygote can tell of it: the row may come with that of its end, or soon."""
        if not self.row.may(Status.RUNNING):
            return
        row = self._has_started(identity, at_ns)

        def record(transaction: Transaction) -> None:
            failpoint("tasks.exec.before_started")
            store.started(transaction, row)

        database.write_soon(record)

    def _has_started(self, identity: Identity, at_ns: int) -> ProcessRow:
        row = self.row = self.row.started(pid=identity.pid, start_time=identity.start_time, at_ns=at_ns)
        log.info("task.started", **self.facts, pid=row.pid)
        return row

    async def mark_ended(self, write: EndWriter, how: Exit) -> None:
        """It has ended; reported any number of times it is written once. Waiters wake when it is written, or if that
        has to wait for the disk."""
        async with self.lock:
            if not self.row.may(Status.STOPPED):
                return
            began = None
            if self.row.may(Status.RUNNING) and how.started_at_ns is not None:  # nobody told us that it started
                began = self.row.started(pid=self.row.pid, start_time=self.row.start_time, at_ns=how.started_at_ns)
            row = (began or self.row).ended(how)

            def record(transaction: Transaction) -> None:
                if began is not None:
                    store.started(transaction, began)
                store.ended(transaction, row)

            failpoint("tasks.exited.before_row")
            try:
                await write(self, record)
            finally:
                # True whatever the database says.
                self.row = row
                self.ended.set()
                self.let_go()
                self.look_unused()
            log.info("task.exited", **self.facts, code=how.code, **({"reason": how.reason} if how.reason else {}))
            failpoint("tasks.exited.after_row")


class Task:
    """One task and its processes, init among them. `shim` is None once its shim has ended; was_attended: then this
    service, or a zygote, held its output.

    settled: not set from when a shim went away until its heir has taken over, or the task's end is known.
    """

    __slots__ = ("_inherited", "_unsettled", "bundle", "processes", "row", "settled", "shim", "was_attended")

    def __init__(self, row: TaskRow, bundle: Bundle, processes: list[Process]) -> None:
        self.row = row
        self.bundle = bundle
        self.processes = {process.row.exec_id: process for process in processes}
        self.shim: Shim | None = None
        self.was_attended = False
        self.settled = asyncio.Event()
        self.settled.set()
        self._unsettled = 0
        self._inherited: dict[str, object] | None = None

    def unsettle(self) -> None:
        """Something is to be found out, and settle() called once it is."""
        self._unsettled += 1
        self.settled.clear()

    def settle(self) -> None:
        """It is found out; the task is settled if nothing else is to be."""
        self._unsettled -= 1
        if not self._unsettled:
            self.settled.set()

    async def inherited(self) -> dict[str, object]:
        """The fields of an OCI process object that an exec has as init has them, unless it says otherwise."""
        if self._inherited is None:
            process = await run_blocking(self.bundle.process)
            self._inherited = {name: value for name, value in process.items() if name not in OF_ONE_PROCESS}
        return self._inherited

    @property
    def init(self) -> Process:
        return self.processes[INIT]

    @property
    def shim_identity(self) -> Identity:
        return Identity(self.row.shim_pid, self.row.shim_start_time)

    def process(self, exec_id: str) -> Process:
        """Raises NotFound."""
        process = self.processes.get(exec_id)
        if process is None:
            raise NotFound(f"container {self.row.key.id} has no exec {exec_id!r}", reason="NO_EXEC")
        return process

    def unmake(self, process: Process) -> None:
        """An exec that could not be made is none; who knows its id may wait for it already, and is told so."""
        del self.processes[process.row.exec_id]
        process.forget(NotFound(f"{process.what} could not be made", reason="NO_EXEC"))

    async def reached(self) -> Shim:
        """Its shim; if that was killed, the one that takes over. Not to be awaited under a process's lock, for which
        the takeover waits. Raises Unavailable if there is none."""
        await self.settled.wait()
        return self.connected()

    def connected(self) -> Shim:
        """Its shim. Raises Unavailable."""
        if self.shim is None or not self.shim.is_open:
            raise Unavailable(f"the shim of container {self.row.key.id} is gone", reason="SHIM_GONE")
        return self.shim

    def keep_streams(self, exec_id: str) -> None:
        """Have the shim send copies of a process's streams, which outlive it here."""
        process = self.processes.get(exec_id)
        if process is not None and self.shim is not None:
            self.shim.streams(exec_id, process.keep)

    def close(self) -> None:
        """Hang up, and let go of what is kept."""
        for process in self.processes.values():
            process.let_go()
        if self.shim is not None:
            self.shim.close()
            self.shim = None


async def told(error: Exception, task: Task) -> Exception:
    """What to tell of an exec's failure: that its container has just ended explains a shim that went away.

    The caller holds no process's lock: an end is written under it.
    """
    if isinstance(error, Unavailable | Referenced) and await task.init.has_ended(within_s=JUST_ENDED_S):
        return has_ended(task)
    return error


def has_ended(task: Task) -> FailedPrecondition:
    """What to tell who wanted it running."""
    return FailedPrecondition(f"container {task.row.key.id} is not running: it has ended", reason="NOT_RUNNING")
