"""One SQLite file: one writer thread, many readers, numbered migrations, and the journal in the same transactions.

Writes go through one thread that runs every function waiting for it in one transaction, each under its own savepoint: a
failing one undoes only itself, and all share one commit (one fsync, if durable). Nobody blocks the event loop and
"database is locked" cannot happen.

Measured on an idle 2-core machine, one row and one event per write (median): 122 us through the thread, 33 us done by
the loop itself; durable 285 and 197; 2,000 at once 32 us each. A database of small writes that need not reach the disk
(`on_loop`) therefore writes right on the loop while nothing else waits; what takes as long as the disk likes, the
checkpoint and its fsync, is a reader thread's work. Reads never wait for a disk, so small ones run right on the loop
too: read_sync 7 us, read() 95. By the connection that writes, if nobody does just then: others have to read anew
what it has committed (after a write 5 us instead of 14).

sqlite3 gives up the GIL in every call, and on a busy machine another thread then takes it: statements cost more than
they seem to. Events are therefore inserted together at the end of a transaction, and glance() begins none.
"""

import asyncio
import contextvars
import errno
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from corral.kernel.failpoint import failpoint
from corral.store.boots import mark_closed, mark_opened
from corral.store.flushing import Flushing
from corral.store.journal import (
    GATHER_S,
    Event,
    Journal,
    Retention,
    newest_seq,
    prune,
)
from corral.store.pending import Pending
from corral.store.room import Room, is_whole, make_empty
from corral.store.schema import migrate
from corral.store.soon import Soon
from corral.store.sql import (
    ConstraintError,
    Duplicate,
    Referenced,
    Row,
    execute,
    is_full,
    opened,
    suppress_no_room,
)
from corral.store.views import Glance, Held, Snapshot, Transaction

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ConstraintError", "Database", "Duplicate", "Referenced", "Row", "Snapshot", "Transaction"]

MAX_GROUP = 128
COMMITS_PER_CHECKPOINT = 400
COMMITS_PER_LOOK = 50
CHECKPOINT_ATTEMPTS, CHECKPOINT_PAUSE_S = 20, 0.05
READER_THREADS = 4
RECALLED = 256
"""Answers, at most, that are kept for recall()."""

ALL_THAT_IS_SANE = Retention()


class Database:
    """See the module. Usable from any thread and any event loop."""

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        *,
        durable: bool,
        on_loop: bool = False,
        journal_keep: Retention = ALL_THAT_IS_SANE,
        journal_delay_s: float = GATHER_S,
    ) -> None:
        """Open or create the file and bring its schema up to date: `migrations[n]` takes version n to n + 1.

        durable=False survives any kill of the process but may lose the last moments at a power loss.
        on_loop: every write() is a few indexed rows, so it may run on the loop itself.
        journal_keep, journal_delay_s: see Journal.
        Raises OSError if it cannot be opened, ValueError if a newer corral wrote it.
        """
        self.path = path
        self._durable = self._synchronous = durable
        self._on_loop = on_loop
        self._turn = threading.Lock()  # held by whoever writes
        self._checkpointing = threading.Lock()  # a second one would do nothing
        self._commits = 0
        self._soon = Soon(self._write_what_waits)
        self._recalled: dict[Hashable, tuple[int, object]] = {}
        self._marked = False
        self._changes = 0
        make_empty(path)
        self._writer = opened(path, durable=durable, create=True)
        self._writer.execute("PRAGMA wal_autocheckpoint = 0")
        try:
            self._room = Room(path, self._writer)
            self._room.keep_log()
            migrate(self._writer, path, migrations)
            self.journal = Journal(self, newest_seq(self._writer), keep=journal_keep, delay_s=journal_delay_s)
            self._try_to_mark()
        except BaseException:
            self._writer.close()
            raise
        self._waiting: deque[Pending] = deque()
        """For the writer thread, in order: whoever has the turn takes, and runs, the first ones."""
        self._bell: SimpleQueue[bool] = SimpleQueue()
        """Rung for each of them; False: it is being closed."""
        self._idle_readers: list[sqlite3.Connection] = []
        self._reading = ThreadPoolExecutor(READER_THREADS, thread_name_prefix=f"read-{path.stem}")
        self._flushing = Flushing(Path(f"{path}-wal"))
        self._open = True
        if self._room.lacks_pages():
            self._reading.submit(self._checkpoint)
        self._thread = threading.Thread(target=self._run_writer, name=f"write-{path.stem}", daemon=True)
        self._thread.start()

    # Writing

    async def write[T](self, fn: Callable[[Transaction], T], *, durable: bool | None = None) -> T:
        """Run `fn` in a transaction and return its result once that is committed.

        `fn` has the caller's context variables, but may run on the writer thread, and once more where the first time is
        undone for want of room: only SQL and arithmetic belong there.
        If the caller is cancelled before `fn` began nothing happens; later than that it still commits.
        `durable` overrides the file's setting for this write; a durable one also makes those before it durable.
        """
        if self._on_loop and not (self._durable if durable is None else durable) and self._turn.acquire(blocking=False):
            try:
                if not self._waiting:  # nobody is overtaken
                    return self._write_here(fn)
            finally:
                self._turn.release()
        pending, future = Pending.for_loop(fn)
        pending.durable = durable
        self._put(pending)
        return await future

    def _write_here[T](self, fn: Callable[[Transaction], T]) -> T:
        """A group of one, whose caller waits right here. The turn must be held."""
        self._require_open()
        if not self._soon.waiting:
            return self._transacted(fn)
        soon = tuple(self._soon.waiting)

        def all_of_it(transaction: Transaction) -> T:
            for each in soon:
                each(transaction)
            return fn(transaction)

        try:
            result = self._transacted(all_of_it)
        except Exception:  # noqa: BLE001  # whichever of them it was: apart
            self._soon.write_each(self._transacted)
            return self._transacted(fn)
        self._soon.written(len(soon))
        return result

    def _transacted[T](self, fn: Callable[[Transaction], T]) -> T:
        def transact() -> tuple[T, list[Event]]:
            self._begin(durable=False)
            transaction = Transaction(self._writer, self.journal.last_seq())
            result = fn(transaction)
            transaction.finish()
            self._commit()
            return result, transaction.events

        result, events = self._with_room(transact)
        if events:
            self.journal.committed(events)
        return result

    def _with_room[T](self, transact: Callable[[], T]) -> T:
        """Once more, where the disk is full, after what can be done about that here. Failing, it is undone."""
        for tries_left in (1, 0):
            try:
                return transact()
            except BaseException as e:
                self._roll_back()
                if not tries_left or not is_full(e):
                    raise
            with suppress(OSError, sqlite3.Error), self._checkpointing:
                self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._room.keep_log()
        raise AssertionError("the last try returns or raises")

    def write_soon(self, fn: Callable[[Transaction], object]) -> None:
        """Have `fn` run in the next transaction, before what that is for, or in one of its own a moment later; on the
        event loop. Nobody is told of its end, and until then reads don't see it.

        For what whoever starts next finds out anyway, should a kill come first: see corral.store.soon.
        """
        self._require_open()
        self._soon.add(fn)

    def _write_what_waits(self) -> None:
        if self._open and self._turn.acquire(blocking=False):
            try:
                if not self._waiting:
                    self._soon.write_each(self._transacted)
                    return
            finally:
                self._turn.release()
        self._soon.hand_over(self._have_run)

    async def persist(self) -> None:
        """Make every committed transaction survive a power loss: what is committed without waiting for the disk can so
        be waited for beside other work. Raises OSError."""
        self._require_open()
        await self._flushing.flush()

    def write_sync[T](self, fn: Callable[[Transaction], T]) -> T:
        """write() for start-up code and other threads; blocks the caller."""
        pending, future = Pending.for_thread(fn)
        self._put(pending)
        return future.result()

    def prune_journal(self, keep: Retention) -> None:
        """Ask for the removal of what of the journal is beyond; returns at once."""
        pending, _ = Pending.for_thread(lambda transaction: prune(transaction.execute, keep))
        self._have_run(pending)

    def _put(self, pending: Pending) -> None:
        self._require_open()
        self._soon.hand_over(self._have_run)
        self._have_run(pending)

    def _have_run(self, pending: Pending) -> None:
        self._waiting.append(pending)
        self._bell.put(True)

    def _run_writer(self) -> None:
        while self._bell.get():
            if self._waiting:  # else it was rung for one that has gone with others
                with self._turn:
                    self._run_group(self._take_group())

    def _take_group(self) -> list[Pending]:
        """Everything that waits now. The turn must be held: what is taken and has not run yet nobody else would see."""
        return [self._waiting.popleft() for _ in range(min(MAX_GROUP, len(self._waiting)))]

    def _run_group(self, group: list[Pending]) -> None:
        """One transaction for the group. A member that fails is undone alone; a failing commit fails them all."""
        started = [pending for pending in group if pending.begin()]
        events: list[Event] = []
        try:
            events = self._with_room(lambda: self._run_members([each for each in started if not each.has_failed]))
        except BaseException as e:  # noqa: BLE001  # this thread must live, and every caller must hear
            for pending in started:
                pending.fail(e)
        if events:  # before anybody learns of the commit: who then asks the journal must find it there
            self.journal.committed(events)
        for pending in started:
            pending.settle()

    def _run_members(self, members: list[Pending]) -> list[Event]:
        events: list[Event] = []
        self._begin(durable=any(self._durable if p.durable is None else p.durable for p in members))
        seq = self.journal.last_seq()
        for pending in members:
            events += self._run_member(pending, seq + len(events), alone=len(members) == 1)
        if self._writer.in_transaction:
            self._commit()
        return events

    def _try_to_mark(self) -> None:
        with suppress_no_room():
            self._with_room(self._mark)
            self.journal.recount(newest_seq(self._writer))

    def _mark(self) -> None:
        """Raises OSError if the disk is full."""
        self._synchronous = self._durable  # it leaves the connection so, whatever happens
        mark_opened(self._writer, durable=self._durable)
        self._marked = True

    def _begin(self, *, durable: bool) -> None:
        if not self._marked:  # the disk was full when it was opened
            self._try_to_mark()
            self._changes = self._writer.total_changes
        if durable != self._synchronous:
            self._set_synchronous(durable)
        execute(self._writer, "BEGIN IMMEDIATE", ())

    def _commit(self) -> None:
        if not self._marked and self._writer.total_changes != self._changes:  # what changes nothing needs no room
            raise OSError(errno.ENOSPC, "database: the disk is full")
        failpoint("store.before_commit")
        execute(self._writer, "COMMIT", ())
        failpoint("store.after_commit")
        self._count_commit()

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error, OSError):
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            self.journal.recount(newest_seq(self._writer))  # what failed may have been the last step of a commit

    def _count_commit(self) -> None:
        """Now and then the log is carried over into the file, beside the writes that go on."""
        self._commits += 1
        is_due = self._commits % COMMITS_PER_CHECKPOINT == 0
        if is_due or (self._commits % COMMITS_PER_LOOK == 0 and self._room.lacks_pages()):
            with suppress(RuntimeError):  # it is being closed, which does the same
                self._reading.submit(self._checkpoint)

    def _checkpoint(self) -> None:
        with self._turn:
            if self._marked:
                self._room.make_pages()
        with suppress(OSError, sqlite3.Error), closing(opened(self.path, durable=self._durable)) as connection:
            for _ in range(CHECKPOINT_ATTEMPTS):
                with self._checkpointing:
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
                if is_whole(self.path, connection):
                    break
                time.sleep(CHECKPOINT_PAUSE_S)  # whoever was reading kept it from going further
        self._room.keep_log()

    def _set_synchronous(self, durable: bool) -> None:
        """Whether the next commit waits for the disk; SQLite takes it between transactions only."""
        self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._synchronous = durable

    def _run_member(self, pending: Pending, newest_seq: int, *, alone: bool) -> list[Event]:
        """Run one member's function; returns the events it journalled."""
        transaction = Transaction(self._writer, newest_seq)
        if not alone:
            self._writer.execute("SAVEPOINT member")
        try:
            pending.run(transaction)
            transaction.finish()
        except BaseException as e:
            if is_full(e) or not self._writer.in_transaction:  # SQLite rolls back all, or may
                raise
            if not alone:
                self._writer.execute("ROLLBACK TO member")
            else:
                self._writer.execute("ROLLBACK")
            pending.fail(e)
            transaction.events.clear()
        if not alone:
            self._writer.execute("RELEASE member")
        return transaction.events

    # Reading

    async def read[T](self, fn: Callable[[Snapshot], T]) -> T:
        """Run `fn` on a consistent view, on a reader thread: for reads of many rows. See read_sync."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._reading, context.run, self.read_sync, fn)

    def read_sync[T](self, fn: Callable[[Snapshot], T]) -> T:
        """Run `fn` on a consistent view, right here.

        Right on the event loop for a few indexed rows: WAL readers never wait for the writer. Use read() for scans.
        There `fn` must not wait for a write: it has the writer's turn if nobody else does.
        """
        if self._takes_turn():
            return self._read_held(fn)
        with self._reader() as connection:
            connection.execute("BEGIN")
            try:
                return fn(Snapshot(connection))
            finally:
                connection.execute("ROLLBACK")

    def glance[T](self, fn: Callable[[Snapshot], T]) -> T:
        """read_sync() for a function of at most one statement, which sees one moment without a transaction around it.

        Source: SQLite, "Isolation In SQLite" and lang_transaction.html: a statement outside of BEGIN is a transaction.
        """
        if self._takes_turn():
            return self._read_held(fn)
        with self._reader() as connection:
            return fn(Glance(connection))

    def _takes_turn(self) -> bool:
        """Whether to read by the connection that writes, whose turn is held then: on a loop, if nobody writes now."""
        return (
            self._on_loop
            and asyncio._get_running_loop() is not None  # noqa: SLF001  # without an exception where none runs
            and self._turn.acquire(blocking=False)
        )

    def _read_held[T](self, fn: Callable[[Snapshot], T]) -> T:
        try:
            self._require_open()
            return fn(Held(self._writer, self._reader))
        finally:
            self._turn.release()

    def recall[T](self, key: Hashable, fn: Callable[[Snapshot], T]) -> T:
        """glance(), or what that gave for the same key if nothing was committed since. Nobody may change it."""
        self._require_open()
        commits = self._commits
        known = self._recalled.get(key)
        if known is not None and known[0] == commits:
            return cast("T", known[1])
        result = self.glance(fn)
        if len(self._recalled) >= RECALLED:
            self._recalled.clear()
        self._recalled[key] = commits, result
        return result

    @contextmanager
    def _reader(self) -> "Iterator[sqlite3.Connection]":
        self._require_open()
        try:
            connection = self._idle_readers.pop()  # atomic under the GIL and in the free-threaded build
        except IndexError:
            connection = opened(self.path, durable=self._durable, read_only=True)
        try:
            yield connection
        finally:
            self._idle_readers.append(connection)
            if not self._open:  # close() went through the list while this one was out
                self._close_readers()

    # Ending

    def close(self) -> None:
        """Commit what was asked for, end the threads and close the file; harmless when repeated."""
        if not self._open:
            return
        self.journal.close()
        self._open = False
        self._soon.hand_over(self._have_run)
        self._bell.put(False)
        self._thread.join()
        self._reading.shutdown(wait=True)
        self._flushing.close()
        self._close_readers()
        with self._turn:
            # On a full disk it is as if it was killed.
            with suppress(OSError, sqlite3.Error):
                self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
            if self._marked:
                with suppress(OSError):
                    mark_closed(self._writer)
            self._writer.close()

    def _require_open(self) -> None:
        if not self._open:
            raise RuntimeError(f"{self.path} is closed")

    def _close_readers(self) -> None:
        while True:
            try:
                self._idle_readers.pop().close()
            except IndexError:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
