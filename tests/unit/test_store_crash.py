"""What a killed process, or a full disk, leaves of a database."""

import asyncio
import errno
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import FileIO
from pathlib import Path

import pytest
from support.file_systems import file_system, lacking_file_system
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
        write_rows(db, 300)
        fill(small_disk / "filler")
        remove_all(db, 300)


@needs("root", "mount")
def test_a_clean_stop_on_a_full_disk_gives_no_room_away(small_disk: Path):
    with Database(small_disk / "x.db", SCHEMA, durable=False, on_loop=True) as db:
        write_rows(db, 300)
        fill(small_disk / "filler")
    with (small_disk / "filler").open("ab", buffering=0) as filler:
        take_all(filler)
        with Database(small_disk / "x.db", SCHEMA, durable=False, on_loop=True) as db:
            take_all(filler)
            assert mark(db) != CLOSED
            remove_all(db, 300)


@needs("root", "mount")
def test_the_log_of_one_that_was_killed_begins_anew_where_it_has_no_room_for_the_mark(small_disk: Path):
    """After another boot."""
    path = small_disk / "x.db"
    with Database(path, SCHEMA, durable=False, on_loop=True) as db:
        write_rows(db, 1)
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:  # which removes the log when it is closed
        raw.execute(f"PRAGMA application_id = {ANOTHER_BOOT}")
        raw.execute("PRAGMA wal_autocheckpoint = 0")
        for key in range(400):
            raw.execute("INSERT OR REPLACE INTO t VALUES (1, ?)", (bytes([key % 256]) * 1000,))
        copies = {name: name.read_bytes() for name in (path, path.with_name("x.db-wal"))}
    for name, content in copies.items():
        name.write_bytes(content)
    with (small_disk / "filler").open("ab", buffering=0) as filler:
        take_all(filler)
        with Database(path, SCHEMA, durable=False, on_loop=True) as db:
            assert mark(db) not in {CLOSED, ANOTHER_BOOT}


@needs("root", "mount")
def test_no_checkpoint_on_a_full_disk_gives_room_away(small_disk: Path):
    with Database(small_disk / "x.db", SCHEMA, durable=False, on_loop=True) as db:
        write_rows(db, 10)
        wait_for_pages(db)
        with (small_disk / "filler").open("ab", buffering=0) as filler:
            take_all(filler)

            async def grow() -> None:
                for key in range(400):
                    await db.write(lambda tx, key=key: add(tx, 1000 + key))
                    assert take_all(filler) == 0

            asyncio.run(grow())


@needs("root", "mount")
def test_free_pages_that_the_file_has_used_up_are_made_again(small_disk: Path):
    with Database(small_disk / "x.db", SCHEMA, durable=False) as db:
        wait_for_pages(db)
        for key in range(100):
            db.write_sync(lambda tx, key=key: tx.execute("INSERT INTO t VALUES (?, ?)", (key, b"x" * 8000)))
        wait_for_pages(db)


@needs("root", "mount")
def test_there_is_room_also_where_a_file_system_copies_what_is_overwritten(tmp_path: Path):
    if reason := lacking_file_system("btrfs"):
        pytest.skip(reason)
    with (
        file_system("btrfs", tmp_path, size_mb=128) as disk,
        (disk / "filler").open("ab", buffering=0) as filler,
        Database(disk / "x.db", SCHEMA, durable=False, on_loop=True) as db,
    ):
        write_rows(db, 300)
        take_all(filler)
        os.fsync(filler.fileno())
        take_all(filler)
        remove_all(db, 300)


@needs("root", "mount")
def test_a_log_that_may_not_grow_begins_anew(small_disk: Path):
    """As by a quota, for which SQLite has no error of its own."""
    with Database(small_disk / "x.db", SCHEMA, durable=False, on_loop=True) as db:
        write_rows(db, 300)
        with no_file_larger_than((small_disk / "x.db-wal").stat().st_size):
            remove_all(db, 300)


@needs("root", "mount")
def test_a_full_disk_is_opened_and_what_is_written_once_there_is_room_is_marked_first(small_disk: Path):
    filler, path = small_disk / "filler", small_disk / "x.db"
    with Database(path, SCHEMA, durable=False) as db:
        db.write_sync(lambda tx: tx.execute("INSERT INTO t VALUES (1, ?)", (b"kept",)))
    with closing(sqlite3.connect(path)) as raw:  # which removes the log, and with it its room, as older versions did
        raw.execute("SELECT * FROM t")
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


def write_rows(db: Database, count: int) -> None:
    for key in range(count):
        db.write_sync(lambda tx, key=key: tx.execute("INSERT INTO t VALUES (?, ?)", (key, b"x" * 200)))
    wait_for_pages(db)


def remove_all(db: Database, count: int) -> None:
    """Of write_rows()."""

    async def one_by_one() -> None:
        for key in range(count):
            await db.write(lambda tx, key=key: remove(tx, key))

    asyncio.run(one_by_one())
    assert keys(db) == []
    assert db.journal.last_seq() == count


def wait_for_pages(db: Database) -> None:
    """Until those that are free lie on the disk."""
    for _ in range(500):
        [[free]] = db.read_sync(lambda s: s.execute("PRAGMA freelist_count"))
        [[pages]] = db.read_sync(lambda s: s.execute("PRAGMA page_count"))
        if free >= 64 and db.path.stat().st_size >= pages * 2048:
            return
        time.sleep(0.01)
    raise AssertionError(f"{free} of {pages} pages are free, and the file has {db.path.stat().st_size} bytes")


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def add(tx: Transaction, key: int) -> None:
    tx.execute("INSERT INTO t VALUES (?, ?)", (key, b"x" * 100))
    tx.journal("t.made", str(key), {"a": "b" * 100}, namespace="default")


def remove(tx: Transaction, key: int) -> None:
    tx.execute("DELETE FROM t WHERE k = ?", (key,))
    tx.journal("t.removed", str(key), namespace="default")


def mark(db: Database) -> int:
    return db.read_sync(lambda s: int(s.execute("PRAGMA application_id")[0][0]))


def take_all(filler: FileIO) -> int:
    """Of the disk; returns how much that was."""
    taken = 0
    for size in (65536, 4096, 1):
        with suppress(OSError):
            while True:
                taken += filler.write(b"x" * size)
    return taken


def fill(path: Path) -> None:
    """Leave no free page."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(iter(lambda: b"x" * 4096, b""))
