"""What functions that read or write a database are given: a view of one moment, or a transaction."""

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from corral.store.journal import JSON, Event, insert, to_text
from corral.store.sql import Row, SqlValue, execute

type Params = Sequence[SqlValue] | Mapping[str, SqlValue]


class Snapshot:
    """One consistent view of the database, valid inside the function it was given to."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, params: Params = ()) -> list[Row]:
        """Run one statement; returns its rows, each indexable by column name.

        Raises Duplicate, Referenced, ConstraintError, OSError(ENOSPC) on a full disk.
        """
        return execute(self._connection, sql, params)

    def one(self, sql: str, params: Params = ()) -> Row | None:
        """The first row, or None."""
        rows = self.execute(sql, params)
        return rows[0] if rows else None


class Glance(Snapshot):
    """A view for one statement: a second one might see another moment."""

    _used = False

    def execute(self, sql: str, params: Params = ()) -> list[Row]:
        if self._used:
            raise RuntimeError("a glance is one statement: use read_sync() for several")
        self._used = True
        return execute(self._connection, sql, params)


class Held(Snapshot):
    """A view by the connection that writes, while its turn is held: what it has written it has in memory, where all
    others read it anew from the log after each commit. What is no query is for one of those, which refuse to write."""

    def __init__(
        self, writer: sqlite3.Connection, reader: Callable[[], AbstractContextManager[sqlite3.Connection]]
    ) -> None:
        super().__init__(writer)
        self._reader = reader

    def execute(self, sql: str, params: Params = ()) -> list[Row]:
        if sql.startswith("SELECT"):
            return execute(self._connection, sql, params)
        with self._reader() as connection:
            return execute(connection, sql, params)


class Transaction(Snapshot):
    """A snapshot that may also write; all of it happens, or, if the function raises, none."""

    def __init__(self, connection: sqlite3.Connection, newest_seq: int) -> None:
        """newest_seq: of the journal, as this transaction finds it."""
        self._connection = connection
        self._newest_seq = newest_seq
        self.events: list[Event] = []

    def journal(
        self,
        topic: str,
        subject: str,
        payload: Mapping[str, JSON] | str | None = None,
        *,
        namespace: str,
        time_ns: int | None = None,
    ) -> int:
        """Append an event that becomes visible with this transaction; returns its sequence number.

        payload: also as the text of a JSON object.
        time_ns: when it happened, if that was not just now.
        """
        self._newest_seq = seq = self._newest_seq + 1
        text = payload if isinstance(payload, str) else to_text(payload) if payload else "{}"
        self.events.append(Event(seq, time_ns or time.time_ns(), namespace, topic, subject, text))
        return seq

    def finish(self) -> None:
        """The function is done: insert what it journalled."""
        if self.events:
            insert(self._connection, self.events)
