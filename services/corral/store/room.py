"""Room for a database on a disk that is full: who removes something must be able to write that down.

What is committed goes to the end of the log (FILE-wal), and at a checkpoint into the file itself, after which the log
is written from its beginning again. So it takes little to go on for long: a log with some room beyond its end, free
pages in the file, and a checkpoint when the log has none left. Nothing gives that room away: SQLite cuts off neither,
and the log stays when the last connection is closed (corral.store.sql).
"""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from corral.kernel.fallocate import reserve
from corral.kernel.in_place import write_in_place
from corral.store.sql import execute

LOG_BYTES = 512 << 10
FREE_PAGES_BYTES = 256 << 10
LARGEST_SHARE = 32
"""Of the disk: a small one is there for what it is to hold."""
LEAST_LEFT = 4
"""Free pages are made through the log, which takes as much again: none are on a disk where they would be the last."""


def make_empty(path: Path) -> None:
    """If it is not there: only of an empty file can it be said that it is to be written in place."""
    with suppress(OSError):  # SQLite will say it
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            write_in_place(fd)
        finally:
            os.close(fd)


def is_whole(path: Path, connection: sqlite3.Connection) -> bool:
    """Whether every page lies in the file itself, so that a checkpoint does not make it longer."""
    [[pages]] = execute(connection, "PRAGMA page_count", ())
    [[page_bytes]] = execute(connection, "PRAGMA page_size", ())
    return path.stat().st_size >= int(pages) * int(page_bytes)


class Room:
    """Of one database. The descriptor of its file is SQLite's alone: with any that is closed the file's locks go."""

    def __init__(self, path: Path, writer: sqlite3.Connection) -> None:
        self._path = path
        self._log = Path(f"{path}-wal")
        self._writer = writer
        self._has_log = False
        self._page_bytes = self._number("PRAGMA page_size")
        self._number("PRAGMA page_count")  # SQLite makes the log when something is read

    def keep_log(self) -> None:
        """Ask for what is missing; where there is none, things are as they were."""
        self._has_log = False
        with suppress(OSError):
            log = os.open(self._log, os.O_RDWR | os.O_CLOEXEC)
            try:
                write_in_place(log)
                reserve(log, 0, min(LOG_BYTES, self._share()))
                self._has_log = True
            finally:
                os.close(log)

    def lacks_pages(self) -> bool:
        """Whether half of them is used up. Without room for the log they would be of no use."""
        if not self._has_log:
            return False
        with suppress(OSError, sqlite3.Error):
            return self._number("PRAGMA freelist_count") * self._page_bytes < self._wanted() // 2
        return False

    def make_pages(self) -> None:
        """Have as many again, by a table that comes and goes. They lie on the disk after the next checkpoint."""
        with suppress(OSError, sqlite3.Error):
            wanted = self._wanted()
            if not self.lacks_pages() or self._free() < LEAST_LEFT * wanted:
                return
            try:
                execute(self._writer, "BEGIN IMMEDIATE", ())
                execute(self._writer, "CREATE TABLE making_room (filler BLOB)", ())
                execute(self._writer, "INSERT INTO making_room VALUES (zeroblob(?))", (wanted,))
                execute(self._writer, "DROP TABLE making_room", ())
                execute(self._writer, "COMMIT", ())
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def _wanted(self) -> int:
        return min(FREE_PAGES_BYTES, self._share())

    def _share(self) -> int:
        disk = os.statvfs(self._path)
        return disk.f_blocks * disk.f_frsize // LARGEST_SHARE

    def _free(self) -> int:
        disk = os.statvfs(self._path)
        return disk.f_bavail * disk.f_frsize

    def _number(self, pragma: str) -> int:
        [row] = execute(self._writer, pragma, ())
        return int(row[0])
