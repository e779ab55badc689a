"""The sqlite3 module, with its errors translated: the only place that knows its result codes."""

import errno
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

Row = sqlite3.Row
type SqlValue = str | bytes | int | float | None


class ConstraintError(Exception):
    """A CHECK or NOT NULL constraint does not hold."""


class Duplicate(ConstraintError):
    """A row with this key exists."""


class Referenced(ConstraintError):
    """A foreign key points to nothing, or something points to this row."""


_CONSTRAINTS = {
    sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY: Duplicate,
    sqlite3.SQLITE_CONSTRAINT_UNIQUE: Duplicate,
    sqlite3.SQLITE_CONSTRAINT_ROWID: Duplicate,
    sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY: Referenced,
    sqlite3.SQLITE_CONSTRAINT_TRIGGER: Referenced,  # what ON DELETE RESTRICT reports
}
_SYSTEM_ERRORS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
    sqlite3.SQLITE_CORRUPT: errno.EUCLEAN,
    sqlite3.SQLITE_NOTADB: errno.EUCLEAN,
}


_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
"""SQLite has no result code of its own for a quota: that is EIO."""


@contextmanager
def suppress_no_room() -> Iterator[None]:
    """Go on after an OSError of a disk that takes nothing more."""
    try:
        yield
    except OSError as e:
        if e.errno not in _NO_ROOM:
            raise


def is_full(e: BaseException) -> bool:
    """Whether SQLite had no room for what it was to write, which has not happened then."""
    code = getattr(e.__cause__, "sqlite_errorcode", None)
    return isinstance(e, OSError) and code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)


@contextmanager
def translated() -> Iterator[None]:
    """Turn sqlite3's errors into ConstraintError and OSError."""
    try:
        yield
    except sqlite3.Error as e:
        raise meaning(e) from e


def meaning(e: sqlite3.Error) -> Exception:
    """What the error says about the world; the error itself if that is a mistake in our SQL."""
    code = getattr(e, "sqlite_errorcode", 0) or 0
    if isinstance(e, sqlite3.IntegrityError):
        return _CONSTRAINTS.get(code, ConstraintError)(str(e))
    number = _SYSTEM_ERRORS.get(code & 0xFF)
    return e if number is None else OSError(number, f"database: {e}")


def opened(path: Path, *, durable: bool, create: bool = False, read_only: bool = False) -> sqlite3.Connection:
    """A connection in WAL mode with foreign keys on, and no implicit transactions. Raises OSError.

    create: make the file if it is not there. Only who begins with it does: a file that has gone is not to be taken for
    an empty one.

    The file is this process' alone as long as it has a connection, and every other process is refused: the connections
    of one process then agree in memory, where they would make two to six fcntl() calls a statement (a quarter of a
    small write). Source: SQLite, "The OS Interface or VFS", unix-excl.

    The log stays when the last one is closed, for the room that it has on the disk; who opens the file next reads it.
    """
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?vfs=unix-excl&mode={'rwc' if create else 'rw'}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=10,
            cached_statements=256,
        )
    except sqlite3.Error as e:
        raise OSError(_SYSTEM_ERRORS.get(e.sqlite_errorcode & 0xFF, errno.EIO), f"database: {e}", str(path)) from e
    try:
        connection.row_factory = sqlite3.Row
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
        with translated():
            # Of a new file: a small write copies and sums up whole pages, and 2 KiB ones cost it a quarter less than 4.
            connection.execute("PRAGMA page_size = 2048")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA temp_store = MEMORY")
            if read_only:
                connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def execute(
    connection: sqlite3.Connection, sql: str, params: Sequence[SqlValue] | Mapping[str, SqlValue]
) -> list[sqlite3.Row]:
    """One statement and all its rows."""
    try:
        return connection.execute(sql, params).fetchall()
    except sqlite3.Error as e:
        translation = meaning(e)
        if translation is e:
            raise
        raise translation from e
