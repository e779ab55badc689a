"""What a killed process, or a full disk, leaves of a database."""

import asyncio
import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.requirements import needs

from corral.store import GAP_TOPIC, Database, Transaction, atomic_write
from corral.store.boots import CLOSED, NUMBERS_LOST_AT_MOST

SCHEMA = ["CREATE TABLE t (k INTEGER PRIMARY KEY, v BLOB) STRICT"]

ANOTHER_BOOT = 5

WRITER = """
import sys
from pathlib import Path
from corral.store import Database

db = Database(Path(sys.argv[1]), ["CREATE TABLE t (k INTEGER PRIMARY KEY, v BLOB) STRICT"], durable=False)

def fn(tx):
    key = tx.one("SELECT coalesce(max(k), 0) + 1 FROM t")[0]
    tx.execute("INSERT INTO t VALUES (?, ?)", (key, b""))
    tx.journal("t.made", str(key), namespace="default")
    return key

while True:
    print(db.write_sync(fn), flush=True)
"""


def write_until_killed(path: Path, failpoints: str) -> list[int]:
    """Run the writer until the failpoint kills it; returns the keys it reported as written."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "CORRAL_FAILPOINTS": failpoints,
    }
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    return [int(line) for line in done.stdout.split()]


def contents(path: Path) -> tuple[list[int], list[int]]:
    """The rows, and the rows that the journal tells of."""
    with Database(path, SCHEMA, durable=False) as db:
        rows = db.read_sync(lambda s: [row[0] for row in s.execute("SELECT k FROM t ORDER BY k")])
        told = db.read_sync(lambda s: [int(row[0]) for row in s.execute("SELECT subject FROM journal ORDER BY seq")])
    return rows, told


def test_killed_before_the_commit_neither_row_nor_event_is_there(tmp_path: Path):
    reported = write_until_killed(tmp_path / "x.db", "store.before_commit=kill@4")
    assert reported in ([1, 2], [1, 2, 3])  # the journal's first pruning is a commit too, of its own or not
    assert contents(tmp_path / "x.db") == (reported, reported)


def test_killed_after_the_commit_both_are_there_although_nobody_was_told(tmp_path: Path):
    reported = write_until_killed(tmp_path / "x.db", "store.after_commit=kill@4")
    assert reported in ([1, 2], [1, 2, 3])
    written = [*reported, len(reported) + 1]
    assert contents(tmp_path / "x.db") == (written, written)


def test_nothing_reported_is_lost_over_many_kills(tmp_path: Path):
    reported: list[int] = []
    for n in range(2, 8):
        reported += write_until_killed(tmp_path / "x.db", f"store.after_commit=kill@{n * 3}")
    rows, told = contents(tmp_path / "x.db")
    assert rows == told == list(range(1, len(rows) + 1))
    assert set(reported) <= set(rows)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "corral-test", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@needs("root", "mount")
def test_a_full_disk_refuses_the_write_and_the_database_goes_on_when_there_is_room(small_disk: Path):
    filler = small_disk / "filler"
    with Database(small_disk / "x.db", SCHEMA, durable=True) as db:
        db.write_sync(lambda tx: tx.execute("INSERT INTO t VALUES (1, ?)", (b"kept",)))
        fill(filler)
        with pytest.raises(OSError, match="database") as caught:
            db.write_sync(lambda tx: tx.execute("INSERT INTO t VALUES (2, ?)", (b"x" * 600_000,)))
        assert caught.value.errno in (errno.ENOSPC, errno.EIO)
        assert keys(db) == [1]
        filler.unlink()
        db.write_sync(lambda tx: tx.execute("INSERT INTO t VALUES (3, ?)", (b"x" * 100_000,)))
        assert keys(db) == [1, 3]


@needs("root", "mount")
@pytest.mark.parametrize("on_loop", [True, False])
def test_who_makes_room_can_write_that_down_on_a_full_disk(small_disk: Path, on_loop: bool):
    """More than the log has room for, so that it has to begin anew."""
    with Database(small_disk / "x.db", SCHEMA, durable=False, on_loop=on_loop) as db:
        for key in range(300):
            db.write_sync(lambda tx, key=key: tx.execute("INSERT INTO t VALUES (?, ?)", (key, b"x" * 200)))
        fill(small_disk / "filler")

        async def remove_all() -> None:
            for key in range(300):
                await db.write(lambda tx, key=key: remove(tx, key))

        asyncio.run(remove_all())
        assert keys(db) == []
        assert db.journal.last_seq() == 300


@needs("root", "mount")
def test_a_full_disk_is_opened_and_what_is_written_once_there_is_room_is_marked_first(small_disk: Path):
    filler, path = small_disk / "filler", small_disk / "x.db"
    with Database(path, SCHEMA, durable=False) as db:
        db.write_sync(lambda tx: tx.execute("INSERT INTO t VALUES (1, ?)", (b"kept",)))
    fill(filler)
    with Database(path, SCHEMA, durable=False, on_loop=True) as db:
        assert keys(db) == [1]
        db.write_sync(lambda tx: tx.execute("DELETE FROM t WHERE k = 99"))  # as daemons do when they start
        with pytest.raises(OSError, match="full"):
            db.write_sync(lambda tx: tx.execute("INSERT INTO t VALUES (2, ?)", (b"",)))
        with pytest.raises(OSError, match="full"):
            asyncio.run(db.write(lambda tx: tx.execute("INSERT INTO t VALUES (2, ?)", (b"",))))
        assert mark(db) == CLOSED
        filler.unlink()
        asyncio.run(db.write(lambda tx: tx.execute("INSERT INTO t VALUES (3, ?)", (b"",))))
        assert keys(db) == [1, 3]
        assert mark(db) != CLOSED
    with Database(path, SCHEMA, durable=False) as db:
        assert keys(db) == [1, 3]


@needs("root", "mount")
@pytest.mark.parametrize("on_loop", [True, False])
def test_events_that_a_loss_of_power_took_leave_their_gap_though_the_disk_was_full_at_first(
    small_disk: Path, on_loop: bool
):
    filler, path = small_disk / "filler", small_disk / "x.db"
    with Database(path, SCHEMA, durable=False) as db:
        db.write_sync(lambda tx: tx.journal("t.made", "1", namespace="default"))
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA application_id = {ANOTHER_BOOT}")
    fill(filler)
    with Database(path, SCHEMA, durable=False) as db:
        assert mark(db) == ANOTHER_BOOT
    with Database(path, SCHEMA, durable=False, on_loop=on_loop) as db:
        filler.unlink()
        seq = asyncio.run(db.write(lambda tx: tx.journal("t.made", "2", namespace="default")))
        assert seq == db.journal.last_seq() > NUMBERS_LOST_AT_MOST
        rows = db.read_sync(lambda s: [(row[0], row[1]) for row in s.execute("SELECT seq, topic FROM journal")])
    assert rows == [(1, "t.made"), (seq - 1, GAP_TOPIC), (seq, "t.made")]


@needs("root", "mount")
def test_a_full_disk_leaves_no_half_written_file(small_disk: Path):
    atomic_write(small_disk / "f", b"old")
    with pytest.raises(OSError, match="No space left"):
        atomic_write(small_disk / "f", b"x" * 20_000_000)
    assert [path.name for path in small_disk.iterdir()] == ["f"]
    assert (small_disk / "f").read_bytes() == b"old"


def keys(db: Database) -> list[int]:
    return [row[0] for row in db.read_sync(lambda s: s.execute("SELECT k FROM t ORDER BY k"))]


def remove(tx: Transaction, key: int) -> None:
    tx.execute("DELETE FROM t WHERE k = ?", (key,))
    tx.journal("t.removed", str(key), namespace="default")


def mark(db: Database) -> int:
    return db.read_sync(lambda s: int(s.execute("PRAGMA application_id")[0][0]))


def fill(path: Path) -> None:
    """Leave no free page."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(iter(lambda: b"x" * 4096, b""))
