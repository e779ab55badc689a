"""The append-only table of what happened, and those who follow it.

An event is appended in the transaction that makes it true (Transaction.journal), so none is lost and none describes
what did not happen. Followers replay from a sequence number and are then woken by the commit itself; nothing polls.
Events come in bursts, so followers are woken a moment after the first one, all those of one event loop together.
"""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from corral.store.sql import Row, execute

if TYPE_CHECKING:
    from corral.store.database import Database, Snapshot

type JSON = bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None

# A number is never used twice: it is one more than the newest row's, and that row is never pruned (AUTOINCREMENT would
# cost a page of a second table in every transaction); after a loss of power see corral.store.boots.
BASE_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (
    seq INTEGER PRIMARY KEY,
    time_ns INTEGER NOT NULL,
    namespace TEXT NOT NULL,
    topic TEXT NOT NULL,
    subject TEXT NOT NULL,
    payload TEXT NOT NULL
) STRICT;
"""

GAP_TOPIC = "journal.gap"
PAGE = 128
TAIL, MOST_TAIL = 128, 512
# How long the first event of a burst waits for others before followers are woken.
GATHER_S = 0.05
MOST_BETWEEN_PRUNINGS_S = 3600.0
# Rows per INSERT.
INSERTED_AT_ONCE = 16

# Some events, the sequence number after which to go on, and whether there may be more already.
type Page = tuple[list[Event], int, bool]


class Event(NamedTuple):
    """One journal row. Its payload is the text that the table has: most are passed on, and looked at by nobody."""

    seq: int
    time_ns: int
    namespace: str
    topic: str
    subject: str
    text: str

    @property
    def payload(self) -> Mapping[str, JSON]:
        """What the text says, parsed at each call."""
        payload: Mapping[str, JSON] = json.loads(self.text)
        return payload

    @property
    def is_gap(self) -> bool:
        """Whether this stands for events that are gone: those after payload["after"] and before payload["next"].
        Its seq is that of the last missing one."""
        return self.topic == GAP_TOPIC


to_text = json.JSONEncoder(separators=(",", ":")).encode
"""A payload as rows have it."""


def insert(connection: sqlite3.Connection, events: Sequence[Event]) -> None:
    """Insert events whose numbers follow the newest row's."""
    for at in range(0, len(events), INSERTED_AT_ONCE):
        some = events[at : at + INSERTED_AT_ONCE]
        params: list[str | int] = []
        for event in some:
            params += (event.seq, event.time_ns, event.namespace, event.topic, event.subject, event.text)
        execute(connection, _insertion(len(some)), params)


@cache
def _insertion(rows: int) -> str:
    return f"INSERT INTO journal VALUES {', '.join(['(?, ?, ?, ?, ?, ?)'] * rows)}"  # noqa: S608 (constants)


@dataclass(frozen=True, slots=True)
class Retention:
    """Which events stay: what is beyond any of the bounds goes, the oldest first, when the next ones are written.

    The newest always stays. Reached by a tenth too late, lest every commit prunes.
    """

    events: int = 100_000
    age_s: float | None = None
    size_bytes: int | None = None
    """Of what they say, without what the table takes."""

    @property
    def looks_after_events(self) -> int:
        """How many come between two prunings."""
        return max(self.events // 10, 100)

    @property
    def looks_after_s(self) -> float:
        """How long it is between two prunings, if an event comes at all."""
        return MOST_BETWEEN_PRUNINGS_S if self.age_s is None else min(self.age_s / 10, MOST_BETWEEN_PRUNINGS_S)


def prune(run: Callable[[str, tuple[int]], object], keep: Retention) -> None:
    """Delete what is beyond, and always keep one: its number says which the next one has."""
    run(_PRUNE_BY_COUNT, (max(keep.events, 1),))
    if keep.age_s is not None:
        run(_PRUNE_BY_AGE, (time.time_ns() - round(keep.age_s * 1e9),))
    if keep.size_bytes is not None:
        run(_PRUNE_BY_SIZE, (keep.size_bytes,))


# Always a beginning: what is in the middle would be no gap that anybody is told of.
_PRUNE_BY_COUNT = "DELETE FROM journal WHERE seq <= (SELECT seq FROM journal ORDER BY seq DESC LIMIT 1 OFFSET ?)"
_PRUNE_BY_AGE = """DELETE FROM journal WHERE seq < coalesce(
    (SELECT seq FROM journal WHERE time_ns >= ? ORDER BY seq LIMIT 1), (SELECT max(seq) FROM journal))"""
_PRUNE_BY_SIZE = """DELETE FROM journal WHERE seq < (SELECT max(seq) FROM journal) AND seq <= (SELECT max(seq) FROM (
    SELECT seq, sum(length(CAST(payload AS BLOB)) + length(CAST(subject AS BLOB)) + length(topic))
        OVER (ORDER BY seq DESC) AS bytes FROM journal) WHERE bytes > ?)"""


def _bytes(event: Event) -> int:
    """As _PRUNE_BY_SIZE counts."""
    return len(event.text) + len(event.subject.encode()) + len(event.topic)


class Journal:
    """The journal of one Database."""

    def __init__(self, database: "Database", newest_seq: int, *, keep: Retention, delay_s: float) -> None:
        """Followers are woken within `delay_s` of a commit."""
        self._database = database
        self._newest_seq = newest_seq
        self._keep = keep
        self._looks_after_events, self._looks_after_s = keep.looks_after_events, keep.looks_after_s
        self._delay_s = delay_s
        self._since_pruning = self._bytes_since_pruning = 0
        self._pruned_at_s = -self._looks_after_s
        self._lock = threading.Lock()
        self._followers: tuple[_Follower, ...] = ()  # replaced, never changed
        self._closed = False
        # Every event from tail[0] on, so that those who keep up need not read the table. It only grows, or is replaced.
        self._tail: list[Event] = []

    def last_seq(self) -> int:
        """The number of the newest event ever written; 0 if there was none."""
        return self._newest_seq

    async def follow(
        self, after: int, *, namespace: str | None = None, until_now: bool = False, deadline_ns: int | None = None
    ) -> AsyncIterator[Event]:
        """pages(), one event at a time."""
        pages = self.pages(after, namespace=namespace, until_now=until_now, deadline_ns=deadline_ns)
        async with aclosing(pages):
            async for page in pages:
                for event in page:
                    yield event

    async def pages(
        self, after: int, *, namespace: str | None = None, until_now: bool = False, deadline_ns: int | None = None
    ) -> AsyncGenerator[Sequence[Event]]:
        """The events numbered above `after`, oldest first, then the new ones as they are committed; never none.

        namespace=None means all. Ends when the database is closed; with until_now=True after the newest that there is;
        with deadline_ns, a time since the epoch, when that has passed. What is missing, because it was pruned or
        because `after` is from another life of this file, is reported in its place by an Event that is_gap, which can
        only be the first of its page.
        """
        follower = _Follower(asyncio.get_running_loop(), self._delay_s)
        with self._lock:
            self._followers = (*self._followers, follower)
        try:
            while not self._closed:
                follower.look()
                events, after, more = self._newest(after, namespace) or self._page(after, namespace)
                for part in _begun_by_gaps(events):
                    yield part
                if more:
                    continue
                if until_now:
                    return
                # Once the time has come it looks a last time: it may not have been woken yet for what is there.
                until_now = not await follower.sleep(deadline_ns)
        finally:
            with self._lock:
                self._followers = tuple(each for each in self._followers if each is not follower)

    def _newest(self, after: int, namespace: str | None) -> "Page | None":
        """What follows `after`, from memory; None if that does not reach back so far."""
        tail = self._tail
        if not tail or not tail[0].seq - 1 <= after <= tail[-1].seq:
            return None
        found = tail[after + 1 - tail[0].seq :]
        events = found if namespace is None else [event for event in found if _is_for(event, namespace)]
        return events, found[-1].seq if found else after, False

    def _page(self, after: int, namespace: str | None) -> "Page":
        return self._database.read_sync(partial(_page, after=after, namespace=namespace))

    def committed(self, events: Sequence[Event]) -> None:
        """Called by who writes, after a commit that appended these."""
        self._newest_seq = events[-1].seq
        if len(self._tail) < MOST_TAIL:
            self._tail += events
        else:
            self._tail = [*self._tail, *events][-TAIL:]
        for follower in self._followers:
            follower.wake()
        self._since_pruning += len(events)
        if self._keep.size_bytes is not None:
            self._bytes_since_pruning += sum(map(_bytes, events))
        if self._is_to_prune():
            self._since_pruning, self._bytes_since_pruning, self._pruned_at_s = 0, 0, time.monotonic()
            self._database.prune_journal(self._keep)

    def _is_to_prune(self) -> bool:
        keep, looked_s_ago = self._keep, time.monotonic() - self._pruned_at_s
        return (
            self._since_pruning > self._looks_after_events
            or looked_s_ago > self._looks_after_s
            or (keep.size_bytes is not None and self._bytes_since_pruning > keep.size_bytes / 10)
        )

    def recount(self, newest_seq: int) -> None:
        """Called by who writes, after a failure, with what the table says."""
        if newest_seq != self._newest_seq:
            self._newest_seq, self._tail = newest_seq, []
            for follower in self._followers:
                follower.wake()

    def close(self) -> None:
        """End every follow()."""
        self._closed = True
        for follower in self._followers:
            follower.wake_now()


class _Follower:
    """One pages() that may be asleep."""

    def __init__(self, loop: asyncio.AbstractEventLoop, delay_s: float) -> None:
        self._loop = loop
        self._delay_s = delay_s
        self._woken = asyncio.Event()
        self._told = False  # it will look, and find what was committed before

    def look(self) -> None:
        """Called right before it looks for events."""
        self._told = False
        self._woken.clear()

    async def sleep(self, deadline_ns: int | None) -> bool:
        """Whether it was woken, rather than the time having come."""
        if deadline_ns is None:
            return await self._woken.wait()
        try:
            await asyncio.wait_for(self._woken.wait(), max(0.0, (deadline_ns - time.time_ns()) / 1e9))
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Something was committed. From any thread."""
        if self._told:
            return
        self._told = True
        if not self._delay_s:
            self.wake_now()
        elif asyncio._get_running_loop() is self._loop:  # noqa: SLF001  # without an exception where none runs
            self._wake_soon()
        else:
            self._in_loop(self._wake_soon)

    def wake_now(self) -> None:
        """From any thread."""
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001
            self._woken.set()
        else:
            self._in_loop(self._woken.set)

    def _in_loop(self, fn: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(fn)

    def _wake_soon(self) -> None:
        asleep = _asleep.setdefault(self._loop, [])
        if not asleep:
            self._loop.call_later(self._delay_s, _wake_all, self._loop)
        asleep.append(self._woken)


# Those who are to be woken soon, by event loop, whatever journal they follow: one timer, and they run in one iteration.
_asleep: WeakKeyDictionary[asyncio.AbstractEventLoop, list[asyncio.Event]] = WeakKeyDictionary()


def _wake_all(loop: asyncio.AbstractEventLoop) -> None:
    for woken in _asleep.pop(loop):
        woken.set()


def newest_seq(connection: sqlite3.Connection) -> int:
    """The number of the newest event; 0 if there never was one."""
    [row] = execute(connection, "SELECT coalesce(max(seq), 0) FROM journal", ())
    return int(row[0])


def _page(snapshot: "Snapshot", after: int, namespace: str | None) -> "Page":
    [[last]] = snapshot.execute("SELECT coalesce(max(seq), 0) FROM journal")
    events = []
    if (gap := _gap(snapshot, after, last)) is not None:
        events.append(gap)
        after = gap.seq
    rows = snapshot.execute(
        "SELECT seq, time_ns, namespace, topic, subject, payload FROM journal"
        " WHERE seq > :after AND (:namespace IS NULL OR namespace = :namespace OR topic = :gap)"
        " ORDER BY seq LIMIT :page",
        {"after": after, "namespace": namespace, "gap": GAP_TOPIC, "page": PAGE},
    )
    events += [_event(row) for row in rows]
    full = len(rows) == PAGE
    return events, (int(rows[-1][0]) if full else max(last, after)), full


def _is_for(event: Event, namespace: str) -> bool:
    return event.namespace == namespace or event.is_gap


def _begun_by_gaps(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    """The same in parts, in which a gap can only be the first."""
    start = 0
    for n, event in enumerate(events):
        if event.is_gap and n > start:
            yield events[start:n]
            start = n
    if start < len(events):
        yield events[start:]


def _event(row: Row) -> Event:
    seq, time_ns, namespace, topic, subject, payload = row
    return Event(seq, time_ns, namespace, topic, subject, payload)


def _gap(snapshot: "Snapshot", after: int, last: int) -> Event | None:
    if after > last:  # the reader knows a future that this file does not: it was replaced; start over
        return _gap_event(after, 0, last)
    row = snapshot.one("SELECT min(seq) FROM journal")
    oldest = last + 1 if row is None or row[0] is None else int(row[0])
    return _gap_event(after, oldest - 1, last) if after < oldest - 1 else None


def _gap_event(after: int, resume: int, last: int) -> Event:
    payload: dict[str, JSON] = {"after": after, "next": resume + 1, "last": last}
    return Event(resume, time.time_ns(), "", GAP_TOPIC, "", to_text(payload))
