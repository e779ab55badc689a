"""What a loss of power takes from a file that does not wait for the disk, and how nobody mistakes what comes after it.

    open     the file says that this boot of the machine writes it, and that is on the disk before anything else is
    close    it says so no more, once all is on the disk
    open     another boot was writing it: what that committed last may be gone. Followers may have been told of it, so
             its numbers are not used again: a gap stands in their place, which ends far beyond

A disk that is too full for the mark can be read; the mark then comes before the first thing that is written.

The mark is SQLite's application_id, which lies in the header and is part of transactions.
"""

import json
import sqlite3
import time
import zlib
from functools import cache
from pathlib import Path

from corral.store.journal import GAP_TOPIC, newest_seq
from corral.store.sql import translated

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# More than can be committed between two checkpoints, which wait for the disk.
NUMBERS_LOST_AT_MOST = 1_000_000
CLOSED = 0


@cache
def boot_id() -> str:
    """Of this boot of the machine."""
    return BOOT_ID.read_text("ascii").strip()


def mark_opened(connection: sqlite3.Connection, *, durable: bool) -> None:
    """Before the first event of this process. durable: what the connection's commits are otherwise.

    Raises OSError, with nothing changed, if the disk is full.
    """
    mark = _mark_of_this_boot()
    with translated():
        [(before,)] = connection.execute("PRAGMA application_id").fetchall()
        if before == mark:  # whoever had it open in this boot was killed, and that takes nothing
            return
        connection.execute("PRAGMA synchronous = FULL")
        try:
            connection.execute("BEGIN IMMEDIATE")
            if before != CLOSED and not durable:
                _insert_gap(connection)
            connection.execute(f"PRAGMA application_id = {mark}")
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")


def mark_closed(connection: sqlite3.Connection) -> None:
    """After the last event, by the last connection. What was committed is on the disk before the mark is."""
    with translated():
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA application_id = {CLOSED}")


def _mark_of_this_boot() -> int:
    """Of 31 bits, and not CLOSED."""
    return zlib.crc32(BOOT_ID.read_bytes()) >> 1 | 1


def _insert_gap(connection: sqlite3.Connection) -> None:
    after = newest_seq(connection)
    last = after + NUMBERS_LOST_AT_MOST
    payload = json.dumps({"after": after, "next": last + 1, "last": last})
    connection.execute("INSERT INTO journal VALUES (?, ?, '', ?, '', ?)", (last, time.time_ns(), GAP_TOPIC, payload))
