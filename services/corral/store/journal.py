"""The append-only table of what happened, and those who follow it.

An event is appended in the transaction that makes it true (Transaction.journal), so none is lost and none describes
what did not happen. Followers replay from a sequence number and are then woken by the commit itself; nothing polls.
"""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from corral.store.sql import Row, execute

if TYPE_CHECKING:
    from corral.store.database import Database, Snapshot

type JSON = bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None

# AUTOINCREMENT: a number is never used twice, not even after the newest rows were pruned.
BASE_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ns INTEGER NOT NULL,
    namespace TEXT NOT NULL,
    topic TEXT NOT NULL,
    subject TEXT NOT NULL,
    payload TEXT NOT NULL
) STRICT;
"""

GAP_TOPIC = "journal.gap"
PAGE = 128
TAIL = 128

# Some events, the sequence number after which to go on, and whether there may be more already.
type Page = tuple[list[Event], int, bool]


@dataclass(frozen=True, slots=True)
class Event:
    """One journal row."""

    seq: int
    time_ns: int
    namespace: str
    topic: str
    subject: str
    payload: Mapping[str, JSON]

    @property
    def is_gap(self) -> bool:
        """Whether this stands for events that are gone: those after payload["after"] and before payload["next"].
        Its seq is that of the last missing one."""
        return self.topic == GAP_TOPIC


def append(
    connection: sqlite3.Connection,
    namespace: str,
    topic: str,
    subject: str,
    payload: Mapping[str, JSON],
    time_ns: int,
) -> Event:
    """Insert one event; returns it as a reader of the table would see it."""
    text = json.dumps(payload, separators=(",", ":"))
    [row] = execute(
        connection,
        "INSERT INTO journal (time_ns, namespace, topic, subject, payload) VALUES (?, ?, ?, ?, ?) RETURNING seq",
        (time_ns, namespace, topic, subject, text),
    )
    return Event(row[0], time_ns, namespace, topic, subject, json.loads(text))


def prune(run: Callable[[str, tuple[int]], object], keep: int) -> None:
    """Delete all but the newest `keep` events."""
    run("DELETE FROM journal WHERE seq <= (SELECT max(seq) FROM journal) - ?", (keep,))


class Journal:
    """The journal of one Database."""

    def __init__(self, database: "Database", *, keep: int) -> None:
        """Of the events at least the newest `keep` stay."""
        self._database = database
        self._keep = keep
        self._since_pruning = 0
        self._lock = threading.Lock()
        self._followers: set[_Follower] = set()
        self._closed = False
        # Every event from tail[0] on, so that those who keep up need not read the table. Replaced, never changed.
        self._tail: tuple[Event, ...] = ()

    def last_seq(self) -> int:
        """The number of the newest event ever written; 0 if there was none."""
        return self._database.read_sync(_last_seq)

    async def follow(
        self, after: int, *, namespace: str | None = None, until_now: bool = False, deadline_ns: int | None = None
    ) -> AsyncIterator[Event]:
        """The events numbered above `after`, oldest first, then each new one as it is committed.

        namespace=None means all. Ends when the database is closed; with until_now=True after the newest that there is;
        with deadline_ns, a time since the epoch, when that has passed. What is missing, because it was pruned or
        because `after` is from another life of this file, is reported in its place by an Event that is_gap.
        """
        follower = _Follower(asyncio.get_running_loop())
        with self._lock:
            self._followers.add(follower)
        try:
            while not self._closed:
                follower.woken.clear()
                events, after, more = self._newest(after, namespace) or self._page(after, namespace)
                for event in events:
                    yield event
                if not more and (until_now or not await follower.sleep(deadline_ns)):
                    return
        finally:
            with self._lock:
                self._followers.discard(follower)

    def _newest(self, after: int, namespace: str | None) -> "Page | None":
        """What follows `after`, from memory; None if that does not reach back so far."""
        tail = self._tail
        if not tail or not tail[0].seq - 1 <= after <= tail[-1].seq:
            return None
        events = [event for event in tail if event.seq > after and namespace in (None, event.namespace)]
        return events, tail[-1].seq, False

    def _page(self, after: int, namespace: str | None) -> "Page":
        return self._database.read_sync(partial(_page, after=after, namespace=namespace))

    def committed(self, events: Sequence[Event]) -> None:
        """Called by the writer thread after a commit that appended these."""
        self._tail = (*self._tail, *events)[-TAIL:]
        self._wake()
        self._since_pruning += len(events)
        if self._since_pruning > max(self._keep // 10, 100):
            self._since_pruning = 0
            self._database.prune_journal(self._keep)

    def close(self) -> None:
        """End every follow()."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            followers = tuple(self._followers)
        for follower in followers:
            follower.wake()


class _Follower:
    """One follow() that may be asleep."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.woken = asyncio.Event()

    async def sleep(self, deadline_ns: int | None) -> bool:
        """Whether it was woken, rather than the time having come."""
        timeout = None if deadline_ns is None else max(0.0, (deadline_ns - time.time_ns()) / 1e9)
        try:
            await asyncio.wait_for(self.woken.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        with suppress(RuntimeError):  # its loop is closed
            self._loop.call_soon_threadsafe(self.woken.set)


def _last_seq(snapshot: "Snapshot") -> int:
    row = snapshot.one("SELECT seq FROM sqlite_sequence WHERE name = 'journal'")
    return 0 if row is None else int(row[0])


def _page(snapshot: "Snapshot", after: int, namespace: str | None) -> "Page":
    last = _last_seq(snapshot)
    events = []
    if (gap := _gap(snapshot, after, last)) is not None:
        events.append(gap)
        after = gap.seq
    rows = snapshot.execute(
        "SELECT seq, time_ns, namespace, topic, subject, payload FROM journal"
        " WHERE seq > :after AND (:namespace IS NULL OR namespace = :namespace) ORDER BY seq LIMIT :page",
        {"after": after, "namespace": namespace, "page": PAGE},
    )
    events += [_event(row) for row in rows]
    full = len(rows) == PAGE
    return events, (int(rows[-1][0]) if full else max(last, after)), full


def _event(row: Row) -> Event:
    seq, time_ns, namespace, topic, subject, payload = row
    return Event(seq, time_ns, namespace, topic, subject, json.loads(payload))


def _gap(snapshot: "Snapshot", after: int, last: int) -> Event | None:
    if after > last:  # the reader knows a future that this file does not: it was replaced; start over
        return _gap_event(after, 0, last)
    row = snapshot.one("SELECT min(seq) FROM journal")
    oldest = last + 1 if row is None or row[0] is None else int(row[0])
    return _gap_event(after, oldest - 1, last) if after < oldest - 1 else None


def _gap_event(after: int, resume: int, last: int) -> Event:
    payload: dict[str, JSON] = {"after": after, "next": resume + 1, "last": last}
    return Event(resume, time.time_ns(), "", GAP_TOPIC, "", payload)
