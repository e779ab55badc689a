import asyncio
import contextvars
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from corral.store import Database, Duplicate, Referenced, Snapshot, Transaction

MIGRATIONS = [
    "CREATE TABLE box (name TEXT PRIMARY KEY, size INTEGER NOT NULL) STRICT",
    "CREATE TABLE item (box TEXT NOT NULL REFERENCES box(name) ON DELETE RESTRICT) STRICT;"
    "CREATE INDEX item_box ON item(box)",
]


def put(name: str, size: int = 1):
    def fn(tx: Transaction) -> int:
        tx.execute("INSERT INTO box VALUES (?, ?)", (name, size))
        return size

    return fn


def names(db: Database) -> list[str]:
    return [row["name"] for row in db.read_sync(lambda s: s.execute("SELECT name FROM box ORDER BY name"))]


@pytest.fixture
def db(tmp_path: Path):
    with Database(tmp_path / "x.db", MIGRATIONS, durable=False) as database:
        yield database


async def test_a_write_returns_the_result_of_its_function(db: Database):
    assert await db.write(put("a", 7)) == 7
    assert names(db) == ["a"]
    assert await db.read(lambda s: s.one("SELECT size FROM box")["size"]) == 7


async def test_a_failing_function_undoes_only_itself(db: Database):
    gate = threading.Event()
    blocker = asyncio.ensure_future(db.write(lambda tx: gate.wait(5)))
    await asyncio.sleep(0.05)

    def half(tx: Transaction) -> None:
        put("half")(tx)
        tx.journal("box.made", "half", namespace="default")
        raise KeyError("stop")

    grouped = [db.write(put("a")), db.write(half), db.write(put("b")), db.write(put("a"))]
    waiting = [asyncio.ensure_future(write) for write in grouped]
    await asyncio.sleep(0.05)
    gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    await blocker
    assert [type(result) for result in results] == [int, KeyError, int, Duplicate]
    assert names(db) == ["a", "b"]
    assert db.journal.last_seq() == 0


async def test_waiting_writes_share_one_commit(db: Database, monkeypatch: pytest.MonkeyPatch):
    commits: list[str] = []
    monkeypatch.setattr("corral.store.database.failpoint", commits.append)
    begun, gate = threading.Event(), threading.Event()
    writes = [asyncio.ensure_future(db.write(lambda tx: (begun.set(), gate.wait(30))))]
    await asyncio.to_thread(begun.wait, 30)
    writes += [asyncio.ensure_future(db.write(put(f"n{i}"))) for i in range(50)]
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(*writes)
    assert commits.count("store.after_commit") == 2
    assert len(names(db)) == 50


async def test_nobody_learns_of_a_result_whose_commit_fails(db: Database, monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str) -> None:
        raise OSError(5, "failpoint")

    monkeypatch.setattr("corral.store.database.failpoint", refuse)
    with pytest.raises(OSError, match="failpoint"):
        await db.write(put("a"))
    monkeypatch.undo()
    assert names(db) == []
    assert await db.write(put("b")) == 1


@pytest.mark.parametrize("on_loop", [False, True])
async def test_a_failure_after_the_commit_costs_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_loop: bool
):
    def refuse(name: str) -> None:
        if name == "store.after_commit":
            raise OSError(5, "failpoint")

    with Database(tmp_path / "y.db", MIGRATIONS, durable=False, on_loop=on_loop) as db:
        assert await db.write(lambda tx: tx.journal("t", "a", namespace="default")) == 1
        monkeypatch.setattr("corral.store.database.failpoint", refuse)
        with pytest.raises(OSError, match="failpoint"):
            await db.write(lambda tx: tx.journal("t", "b", namespace="default"))
        monkeypatch.undo()
        assert await db.write(lambda tx: tx.journal("t", "c", namespace="default")) == 3
        told = [event.subject async for event in db.journal.follow(0, until_now=True)]
        assert told == ["a", "b", "c"]


async def test_a_single_write_may_wait_for_the_disk_or_not(db: Database):
    levels = [
        await db.write(lambda tx: tx.one("PRAGMA synchronous")[0], durable=durable)
        for durable in (True, False, True, None)
    ]
    assert levels == [2, 1, 2, 1]  # FULL, NORMAL


async def test_a_caller_cancelled_before_its_turn_writes_nothing(db: Database):
    gate = threading.Event()
    blocker = asyncio.ensure_future(db.write(lambda tx: gate.wait(5)))
    await asyncio.sleep(0.05)
    late = asyncio.ensure_future(db.write(put("late")))
    await asyncio.sleep(0)
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    gate.set()
    await blocker
    await db.write(put("after"))
    assert names(db) == ["after"]


async def test_functions_see_the_context_variables_of_their_caller(db: Database):
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(42)
    assert await db.write(lambda tx: variable.get()) == 42
    assert await db.read(lambda tx: variable.get()) == 42


def test_constraints_have_names_of_their_own(db: Database):
    db.write_sync(put("a"))
    with pytest.raises(Duplicate):
        db.write_sync(put("a"))
    with pytest.raises(Referenced):
        db.write_sync(lambda tx: tx.execute("INSERT INTO item VALUES ('nowhere')"))
    db.write_sync(lambda tx: tx.execute("INSERT INTO item VALUES ('a')"))
    with pytest.raises(Referenced):
        db.write_sync(lambda tx: tx.execute("DELETE FROM box"))


def test_a_function_may_catch_a_constraint_and_go_on(db: Database):
    db.write_sync(put("a"))

    def fn(tx: Transaction) -> None:
        try:
            put("a")(tx)
        except Duplicate:
            put("b")(tx)

    db.write_sync(fn)
    assert names(db) == ["a", "b"]


def test_a_reader_sees_one_moment(db: Database):
    def fn(snapshot):
        before = snapshot.one("SELECT count(*) FROM box")[0]
        db.write_sync(put("x"))
        return before, snapshot.one("SELECT count(*) FROM box")[0]

    assert db.read_sync(fn) == (0, 0)
    assert names(db) == ["x"]


def test_readers_cannot_write(db: Database):
    with pytest.raises((OSError, sqlite3.OperationalError)):
        db.read_sync(lambda s: s.execute("INSERT INTO box VALUES ('a', 1)"))
    assert names(db) == []


def test_a_glance_is_one_statement(db: Database):
    db.write_sync(put("a"))
    assert db.glance(lambda s: s.one("SELECT size FROM box"))["size"] == 1
    with pytest.raises(RuntimeError, match="one statement"):
        db.glance(lambda s: (s.one("SELECT 1"), s.one("SELECT 2")))
    with pytest.raises((OSError, sqlite3.OperationalError)):
        db.glance(lambda s: s.execute("INSERT INTO box VALUES ('a', 1)"))


async def test_a_reader_on_the_loop_needs_no_connection_of_its_own_and_cannot_write_either(tmp_path: Path):
    with Database(tmp_path / "y.db", MIGRATIONS, durable=False, on_loop=True) as db:
        await db.write(put("a"))
        assert names(db) == ["a"]
        assert db.glance(lambda s: s.one("SELECT size FROM box"))["size"] == 1
        assert db._idle_readers == []
        for read in (db.read_sync, db.glance):
            with pytest.raises((OSError, sqlite3.OperationalError)):
                read(lambda s: s.execute("INSERT INTO box VALUES ('b', 1)"))
        assert names(db) == ["a"]
        await db.write(put("b"))
        assert names(db) == ["a", "b"]


async def test_a_reader_on_the_loop_sees_what_is_committed_while_somebody_writes(tmp_path: Path):
    with Database(tmp_path / "y.db", MIGRATIONS, durable=False, on_loop=True) as db:

        def within(tx: Transaction) -> list[str]:
            put("a")(tx)
            return names(db)

        assert await db.write(within) == []
        assert db.read_sync(lambda _: names(db)) == ["a"]  # within another one
        begun, may_end = threading.Event(), threading.Event()

        def slowly(tx: Transaction) -> None:
            put("b")(tx)
            begun.set()
            may_end.wait(30)

        writing = asyncio.ensure_future(db.write(slowly, durable=True))
        await asyncio.to_thread(begun.wait, 30)
        assert names(db) == ["a"]
        may_end.set()
        await writing
        assert names(db) == ["a", "b"]


async def test_a_failing_write_on_the_loop_undoes_only_itself(tmp_path: Path):
    with Database(tmp_path / "y.db", MIGRATIONS, durable=False, on_loop=True) as db:
        await db.write(put("a"))

        def half(tx: Transaction) -> None:
            put("half")(tx)
            tx.journal("box.made", "half", namespace="default")
            raise KeyError("stop")

        with pytest.raises(KeyError):
            await db.write(half)
        assert names(db) == ["a"]
        assert await db.write(lambda tx: tx.journal("box.made", "b", namespace="default")) == 1
        await db.write(put("b"), durable=True)
        assert names(db) == ["a", "b"]


def test_no_other_process_takes_part(db: Database):
    db.write_sync(put("a"))
    other = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0.1).execute('SELECT * FROM box')"
    done = subprocess.run([sys.executable, "-c", other, str(db.path)], capture_output=True, text=True, check=False)
    assert "database is locked" in done.stderr
    assert names(db) == ["a"]


def test_reopening_runs_only_new_migrations(tmp_path: Path):
    path = tmp_path / "x.db"
    with Database(path, MIGRATIONS[:1], durable=True) as db:
        db.write_sync(put("kept"))
    with Database(path, MIGRATIONS, durable=True) as db:
        assert names(db) == ["kept"]
        assert db.read_sync(lambda s: s.execute("SELECT * FROM item")) == []


def test_a_failing_migration_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "x.db"
    with Database(path, MIGRATIONS[:1], durable=True) as db:
        db.write_sync(put("kept"))
    with pytest.raises(sqlite3.OperationalError):
        Database(path, [*MIGRATIONS[:1], "CREATE TABLE t (a); NONSENSE"], durable=True)
    with Database(path, MIGRATIONS, durable=True) as db:
        assert names(db) == ["kept"]


def test_a_file_of_a_newer_corral_is_refused(tmp_path: Path):
    path = tmp_path / "x.db"
    Database(path, MIGRATIONS, durable=False).close()
    with pytest.raises(ValueError, match="newer corral"):
        Database(path, MIGRATIONS[:1], durable=False)


def test_a_file_that_goes_while_it_is_in_use_is_not_made_anew(tmp_path: Path):
    with Database(tmp_path / "a.db", MIGRATIONS, durable=False) as db:
        assert db.read_sync(lambda s: s.execute("SELECT 1")) != []
        (tmp_path / "a.db").unlink()

        def two_at_once(_: Snapshot) -> None:  # the second needs a connection of its own
            db.read_sync(lambda s: s.execute("SELECT count(*) FROM journal"))

        with pytest.raises(OSError, match="unable to open database file"):
            db.read_sync(two_at_once)
    assert not (tmp_path / "a.db").exists()


def test_a_path_that_cannot_be_opened_is_an_oserror(tmp_path: Path):
    with pytest.raises(OSError, match="database"):
        Database(tmp_path / "missing" / "x.db", [], durable=False)


def test_close_commits_what_was_asked_for_and_then_refuses(tmp_path: Path):
    path = tmp_path / "x.db"
    db = Database(path, MIGRATIONS, durable=False)
    threads = [threading.Thread(target=lambda i=i: db.write_sync(put(f"n{i}"))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    db.close()
    db.close()
    with pytest.raises(RuntimeError, match="closed"):
        db.write_sync(put("late"))
    with pytest.raises(RuntimeError, match="closed"):
        names(db)
    with Database(path, MIGRATIONS, durable=False) as again:
        assert len(names(again)) == 8
