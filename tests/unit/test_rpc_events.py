import asyncio
import time
from pathlib import Path

import pytest
from google.protobuf.struct_pb2 import Struct

from corral.api.types.v1 import types_pb2
from corral.rpc.context import in_namespace
from corral.rpc.events import nanoseconds, stream_events, timestamp, write_event, write_facts
from corral.store import Database, Retention


@pytest.fixture
def db(tmp_path: Path):
    with Database(tmp_path / "x.db", [], durable=False) as database:
        yield database


def add(db: Database, topic: str, subject: str, namespace: str = "default") -> None:
    db.write_sync(lambda tx: tx.journal(topic, subject, {"code": 3, "why": None, "l": ["a"]}, namespace=namespace))


async def ask(db: Database, **fields: object) -> list[types_pb2.EventsResponse]:
    request = types_pb2.EventsRequest(**fields)
    async with asyncio.timeout(5):
        return [response async for response in stream_events(db.journal, request)]


def subjects(responses: list[types_pb2.EventsResponse]) -> list[str]:
    assert all(response.events for response in responses)
    return [event.subject for response in responses for event in response.events]


async def test_topics_are_exact_or_prefixes(db: Database):
    for topic in ("task.created", "task.exited", "tasks.x", "network.created"):
        add(db, topic, topic)
    assert subjects(await ask(db, no_follow=True, topics=["task.*"])) == ["task.created", "task.exited"]
    assert subjects(await ask(db, no_follow=True, topics=["tasks.x", "net*"])) == ["tasks.x", "network.created"]
    assert subjects(await ask(db, no_follow=True, topics=["task"])) == []
    assert len(subjects(await ask(db, no_follow=True))) == 4


async def test_a_burst_is_one_message_and_a_long_replay_several(db: Database):
    db.write_sync(lambda tx: [tx.journal("t", str(i), namespace="default") for i in range(300)])
    responses = await ask(db, no_follow=True)
    assert subjects(responses) == [str(i) for i in range(300)]
    assert len(responses) < 10


async def test_subjects_and_namespaces_select(db: Database):
    add(db, "t", "a")
    add(db, "t", "b", "blue")
    add(db, "t", "c")
    assert subjects(await ask(db, no_follow=True)) == ["a", "c"]
    assert subjects(await ask(db, no_follow=True, all_namespaces=True)) == ["a", "b", "c"]
    assert subjects(await ask(db, no_follow=True, subjects=["c", "b"])) == ["c"]
    with in_namespace("blue"):
        assert subjects(await ask(db, no_follow=True)) == ["b"]


async def test_since_and_until_bound_the_time(db: Database):
    add(db, "t", "before")
    await asyncio.sleep(0.01)
    middle = timestamp(time.time_ns())
    await asyncio.sleep(0.01)
    add(db, "t", "after")
    assert subjects(await ask(db, no_follow=True, since=middle)) == ["after"]
    assert subjects(await ask(db, until=middle)) == ["before"]


async def test_a_follow_ends_when_until_has_passed(db: Database):
    add(db, "t", "a")
    started = time.monotonic()
    assert subjects(await ask(db, until=timestamp(time.time_ns() + 200_000_000))) == ["a"]
    assert 0.1 < time.monotonic() - started < 30


async def test_a_gap_says_where_it_resumes(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False) as db:
        for i in range(6):
            add(db, "t", str(i))
        db.prune_journal(Retention(2))
    with Database(tmp_path / "y.db", [], durable=False) as db:
        [response] = await ask(db, after=1, no_follow=True)
        assert not (await ask(db, after=4, no_follow=True))[0].HasField("gap")
    assert response.gap.resumes_at == 5
    assert [event.seq for event in response.events] == [5, 6]


async def test_an_event_arrives_whole(db: Database):
    add(db, "task.exited", "c1", "blue")
    [event] = [event async for event in db.journal.follow(0, until_now=True)]
    message = types_pb2.Event()
    write_event(message, event)
    assert (message.seq, message.namespace, message.topic, message.subject) == (1, "blue", "task.exited", "c1")
    assert nanoseconds(message.time) == event.time_ns
    assert message.payload["code"] == 3
    assert message.payload["why"] is None
    assert list(message.payload["l"]) == ["a"]
    again = types_pb2.Event()
    again.payload.update(dict(event.payload))
    assert message.payload == again.payload


def test_facts_of_every_kind_are_written_as_protobuf_would():
    facts = {"t": True, "f": 1.5, "none": None, "no": [], "nothing": {}, "deep": {"l": [1, [False, {"k": "v"}]]}}
    mine, theirs = Struct(), Struct()
    write_facts(mine, facts)
    theirs.update(facts)
    assert mine == theirs
    assert mine.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)
