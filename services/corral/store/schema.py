"""Which version of its schema a file has: SQLite's user_version, the number of migrations that it has seen."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from corral.store.journal import BASE_SCHEMA
from corral.store.sql import translated

# Big-endian, and so is all of the header. Source: SQLite, "Database File Format", 1.3.
USER_VERSION_AT, USER_VERSION_BYTES = 60, 4


def require_known(path: Path, known: int) -> None:
    """Raises ValueError if a newer corral wrote the file, which may be in use, or not be there."""
    try:
        with path.open("rb") as file:
            file.seek(USER_VERSION_AT)
            _require_known(path, int.from_bytes(file.read(USER_VERSION_BYTES)), known)
    except FileNotFoundError:
        return


def _require_known(path: Path, version: int, known: int) -> None:
    if version > known:
        raise ValueError(
            f"{path} has schema version {version}, this corral knows {known}: a newer corral wrote it; install that one"
        )


def migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Run the migrations the file has not seen, each in a transaction of its own with its number.

    Raises ValueError if a newer corral wrote it.
    """
    [(version,)] = connection.execute("PRAGMA user_version").fetchall()
    _require_known(path, version, len(migrations))
    with translated():
        connection.executescript(BASE_SCHEMA)
        for number, script in enumerate(migrations[version:], start=version + 1):
            try:
                connection.executescript(f"BEGIN IMMEDIATE;\n{script};\nPRAGMA user_version = {number};\nCOMMIT;")
            except sqlite3.Error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        if version < len(migrations):
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")  # for require_known(), which sees but the file itself
