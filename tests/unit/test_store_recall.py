"""Answers of a database that are remembered until the next commit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.store import Database, Snapshot, Transaction

MIGRATIONS = ["CREATE TABLE box (name TEXT PRIMARY KEY, size INTEGER NOT NULL) STRICT"]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "x.db", MIGRATIONS, durable=False, on_loop=True) as database:
        yield database


def put(name: str):
    def fn(tx: Transaction) -> None:
        tx.execute("INSERT INTO box VALUES (?, 1)", (name,))

    return fn


async def test_an_answer_is_remembered_until_something_is_committed(db: Database):
    asked: list[str] = []

    def count(view: Snapshot) -> int:
        asked.append("")
        row = view.one("SELECT count(*) FROM box")
        assert row is not None
        return int(row[0])

    assert [db.recall("boxes", count), db.recall("boxes", count), len(asked)] == [0, 0, 1]
    await db.write(put("a"))
    db.write_sync(lambda tx: None)  # after the first event the journal is pruned
    assert [db.recall("boxes", count), db.recall("boxes", count), len(asked)] == [1, 1, 2]
    await db.write(put("b"), durable=True)  # by the writer thread
    assert [db.recall("boxes", count), len(asked)] == [2, 3]


async def test_answers_of_many_questions_are_not_all_kept(db: Database):
    for number in range(1000):
        assert db.recall(number, lambda view, number=number: (view.one("SELECT 1"), number))[1] == number
    assert len(db._recalled) < 500
