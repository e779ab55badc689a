"""Writes that wait for a transaction to share."""

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from corral.store import Database, Duplicate, Transaction

MIGRATIONS = ["CREATE TABLE box (name TEXT PRIMARY KEY, size INTEGER NOT NULL) STRICT"]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "x.db", MIGRATIONS, durable=False, on_loop=True) as database:
        yield database


def put(name: str, size: int = 1):
    def fn(tx: Transaction) -> None:
        tx.execute("INSERT INTO box VALUES (?, ?)", (name, size))
        tx.journal("box.made", name, namespace="default")

    return fn


def names(db: Database) -> list[str]:
    return [row["name"] for row in db.read_sync(lambda s: s.execute("SELECT name FROM box ORDER BY rowid"))]


def commits(db: Database) -> int:
    return db._commits


async def test_what_is_written_soon_shares_the_next_transaction_and_comes_before_it(db: Database):
    await db.write(put("first"))
    db.write_sync(lambda tx: None)  # after the first event the journal is pruned
    before = commits(db)
    db.write_soon(put("a"))
    db.write_soon(put("b"))
    assert names(db) == ["first"]
    await db.write(put("c"))
    assert names(db) == ["first", "a", "b", "c"]
    assert commits(db) == before + 1
    assert [event.subject async for event in db.journal.follow(0, until_now=True)] == ["first", "a", "b", "c"]


async def test_what_nothing_else_is_written_after_is_written_a_moment_later(db: Database):
    db.write_soon(put("a"))
    following = db.journal.follow(0)
    assert (await asyncio.wait_for(anext(following), 5)).subject == "a"
    await following.aclose()


async def test_a_write_that_fails_takes_nothing_that_waited_along(db: Database):
    await db.write(put("taken"))
    db.write_soon(put("a"))
    with pytest.raises(Duplicate):
        await db.write(put("taken"))
    assert names(db) == ["taken", "a"]
    await db.write(put("b"))
    assert names(db) == ["taken", "a", "b"]


async def test_one_that_fails_itself_fails_no_later_write_and_is_told_of(db: Database):
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))
    await db.write(put("taken"))
    db.write_soon(put("taken"))
    await db.write(put("a"))
    assert names(db) == ["taken", "a"]
    assert [type(error) for error in told] == [Duplicate]


@pytest.mark.parametrize("durable", [True, None])
async def test_a_write_of_the_writer_thread_does_not_overtake_it(db: Database, durable: bool | None):
    with db._turn if durable is None else nullcontext():  # while somebody else has the turn, or because of the disk
        db.write_soon(put("a"))
        following = asyncio.ensure_future(db.write(put("b"), durable=durable))
        await asyncio.sleep(0)
    await following
    assert names(db) == ["a", "b"]


async def test_closing_writes_what_waits(tmp_path: Path):
    db = Database(tmp_path / "x.db", MIGRATIONS, durable=False, on_loop=True)
    db.write_soon(put("a"))
    await asyncio.to_thread(db.close)
    with Database(tmp_path / "x.db", MIGRATIONS, durable=False) as again:
        assert names(again) == ["a"]
    await asyncio.sleep(0.05)  # its time comes, and finds nothing to do


async def test_what_is_written_on_the_loop_overtakes_nothing_that_a_thread_is_about_to_write(db: Database):
    await db.write(put("first"))
    for _ in range(300):
        order: list[str] = []
        db.write_soon(lambda tx, order=order: order.append("soon"))
        elsewhere = asyncio.ensure_future(db.write(lambda tx, order=order: order.append("thread"), durable=True))
        await asyncio.sleep(0)  # both are the thread's now
        for _ in range(10):
            names(db)  # who reads here has it wait
        await db.write(lambda tx, order=order: order.append("loop"))
        await elsewhere
        assert order == ["soon", "thread", "loop"]
