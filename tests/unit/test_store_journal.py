import asyncio
import enum
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.store import GAP_TOPIC, Database, Event, Retention, Transaction


@pytest.fixture
def db(tmp_path: Path):
    with Database(tmp_path / "x.db", [], durable=False) as database:
        yield database


def add(db: Database, subject: str, namespace: str = "default") -> int:
    return db.write_sync(lambda tx: tx.journal("box.made", subject, {"n": [1, None]}, namespace=namespace))


async def take(db: Database, count: int, after: int = 0, namespace: str | None = None) -> list[Event]:
    events: list[Event] = []
    async with asyncio.timeout(5):
        async for event in db.journal.follow(after, namespace=namespace):
            events.append(event)
            if len(events) == count:
                break
    return events


async def test_follow_replays_in_order_with_everything_that_was_written(db: Database):
    for subject in "abc":
        add(db, subject)
    events = await take(db, 2, after=1)
    assert [(e.seq, e.subject) for e in events] == [(2, "b"), (3, "c")]
    assert events[0].payload == {"n": [1, None]}
    assert (events[0].topic, events[0].namespace) == ("box.made", "default")
    assert events[0].time_ns > 0


async def test_a_follower_is_woken_by_the_commit(db: Database):
    follower = asyncio.ensure_future(take(db, 3))
    await asyncio.sleep(0.05)
    for subject in "abc":
        await db.write(lambda tx, s=subject: tx.journal("box.made", s, namespace="default"))
    assert [e.subject for e in await follower] == ["a", "b", "c"]


async def test_namespaces_do_not_see_each_other(db: Database):
    add(db, "a", "one")
    add(db, "b", "two")
    add(db, "c", "one")
    assert [e.subject for e in await take(db, 2, namespace="one")] == ["a", "c"]


async def test_a_long_replay_comes_in_pages_without_loss(db: Database):
    db.write_sync(lambda tx: [tx.journal("t", str(i), namespace="default") for i in range(1000)])
    assert [e.seq for e in await take(db, 1000)] == list(range(1, 1001))
    assert [e.seq for e in await take(db, 744, after=256)] == list(range(257, 1001))


async def test_pruned_events_are_reported_as_a_gap(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False) as db:
        for i in range(10):
            add(db, str(i))
        db.prune_journal(Retention(4))
    with Database(tmp_path / "y.db", [], durable=False) as db:
        gap, *rest = await take(db, 5, after=2)
        assert gap.topic == GAP_TOPIC
        assert gap.is_gap
        assert (gap.seq, gap.payload) == (6, {"after": 2, "next": 7, "last": 10})
        assert [e.seq for e in rest] == [7, 8, 9, 10]
        assert not (await take(db, 1, after=6))[0].is_gap


async def test_followers_far_behind_and_up_to_date_see_the_same(db: Database):
    first = asyncio.ensure_future(take(db, 400))
    for n in range(400):
        await db.write(lambda tx, n=n: tx.journal("t", str(n), {"list": (1, 2)}, namespace="default"))
    from_table = await take(db, 400)
    assert await first == from_table
    assert await take(db, 30, after=370) == from_table[370:]
    assert from_table[0].payload == {"list": [1, 2]}


async def test_a_transaction_that_fails_leaves_no_event_in_memory_either(db: Database):
    add(db, "a")

    def fail(tx: Transaction) -> None:
        tx.journal("t", "never", namespace="default")
        raise KeyError

    with pytest.raises(KeyError):
        await db.write(fail)
    add(db, "b")
    assert [(e.seq, e.subject) for e in await take(db, 2)] == [(1, "a"), (2, "b")]


async def test_the_journal_prunes_itself(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False, journal_keep=Retention(50)) as db:
        for _ in range(5):
            db.write_sync(lambda tx: [tx.journal("t", "s", namespace="default") for _ in range(101)])
        kept = db.write_sync(lambda tx: tx.one("SELECT count(*) FROM journal")[0])
        assert kept <= 50 + 101
        assert db.journal.last_seq() == 505


async def test_what_is_too_old_goes_and_the_newest_stays_whatever_its_age(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False) as db:
        for days_ago in range(10, 5, -1):
            when = time.time_ns() - days_ago * 86400 * 10**9
            db.write_sync(lambda tx, n=days_ago, at=when: tx.journal("t", f"{n}", namespace="default", time_ns=at))
        db.prune_journal(Retention(age_s=8.5 * 86400))
    with Database(tmp_path / "y.db", [], durable=False) as db:
        gap, *rest = await take(db, 4)
        assert (gap.is_gap, gap.payload["next"]) == (True, 3)
        assert [e.subject for e in rest] == ["8", "7", "6"]
        db.prune_journal(Retention(age_s=1))
    with Database(tmp_path / "y.db", [], durable=False) as db:
        assert [e.subject for e in (await take(db, 2))[1:]] == ["6"]
        assert add(db, "next") == 6


async def test_what_takes_too_much_room_goes(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False) as db:
        for n in range(20):
            db.write_sync(lambda tx, n=n: tx.journal("t", f"{n:04}", {"text": "x" * 1000}, namespace="default"))
        db.prune_journal(Retention(size_bytes=5500))
    with Database(tmp_path / "y.db", [], durable=False) as db:
        gap, *rest = await take(db, 6)
        assert gap.is_gap
        assert [e.subject for e in rest] == ["0015", "0016", "0017", "0018", "0019"]
        db.prune_journal(Retention(size_bytes=1))
    with Database(tmp_path / "y.db", [], durable=False) as db:
        assert [e.subject for e in (await take(db, 2))[1:]] == ["0019"]


async def test_it_prunes_itself_by_the_room_that_it_takes_however_few_the_events_are(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False, journal_keep=Retention(size_bytes=10_000)) as db:
        for _ in range(60):
            db.write_sync(lambda tx: tx.journal("t", "s", {"text": "x" * 1000}, namespace="default"))
        [bytes_] = db.write_sync(lambda tx: tx.one("SELECT sum(length(payload)) FROM journal"))
        assert bytes_ <= 12_000


async def test_old_events_go_when_another_one_comes(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False, journal_keep=Retention(age_s=0.2)) as db:
        add(db, "old")
        await asyncio.sleep(0.4)
        for subject in ("new", "newer"):
            add(db, subject)
        kept = db.write_sync(lambda tx: [row[0] for row in tx.execute("SELECT subject FROM journal ORDER BY seq")])
        assert kept == ["new", "newer"]


async def test_a_number_from_another_life_of_the_file_is_a_gap(db: Database):
    add(db, "a")
    gap, event = await take(db, 2, after=99)
    assert gap.is_gap
    assert event.subject == "a"


async def test_numbers_are_not_reused_after_pruning(db: Database):
    add(db, "a")
    db.prune_journal(Retention(0))
    assert add(db, "b") == 2
    assert db.journal.last_seq() == 2


async def test_numbers_go_on_after_pruning_and_reopening(tmp_path: Path):
    for expected in (1, 2, 3):
        with Database(tmp_path / "y.db", [], durable=False) as db:
            assert db.journal.last_seq() == expected - 1
            assert add(db, "a") == expected
            db.prune_journal(Retention(0))


async def test_a_replay_until_now_ends_by_itself(db: Database):
    for i in range(300):
        add(db, str(i))
    async with asyncio.timeout(5):
        assert len([event async for event in db.journal.follow(0, until_now=True)]) == 300
        assert [event async for event in db.journal.follow(300, until_now=True)] == []


async def test_a_burst_of_commits_wakes_followers_once(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False, journal_delay_s=1) as db:
        pages = aiter(db.journal.pages(0))
        first = asyncio.ensure_future(anext(pages))
        await asyncio.sleep(0.05)
        for subject in "abc":
            await db.write(lambda tx, s=subject: tx.journal("box.made", s, namespace="default"))
        assert not first.done()
        assert [event.subject for event in await first] == ["a", "b", "c"]


async def test_without_a_delay_followers_are_woken_at_once(tmp_path: Path):
    with Database(tmp_path / "y.db", [], durable=False, on_loop=True, journal_delay_s=0) as db:
        follower = asyncio.ensure_future(take(db, 1))
        await asyncio.sleep(0.05)
        await db.write(lambda tx: tx.journal("box.made", "a", namespace="default"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert follower.done()


async def test_what_was_committed_right_before_the_deadline_is_told(db: Database):
    deadline_ns = time.time_ns() + 2_000_000_000

    async def follow() -> list[str]:
        return [event.subject async for event in db.journal.follow(0, deadline_ns=deadline_ns)]

    follower = asyncio.ensure_future(follow())
    await asyncio.sleep(0.05)
    add(db, "late")
    while time.time_ns() <= deadline_ns:  # the loop gets to it only afterwards
        time.sleep(0.05)  # noqa: ASYNC251
    assert await follower == ["late"]


async def test_a_payload_is_told_as_it_is_kept(db: Database):
    class Colour(enum.IntEnum):
        RED = 3

    facts = {"colour": Colour.RED, "pair": (1, {"deep": (2.5, None)}), "yes": True, "text": "\u2028\U0001f40e"}
    follower = asyncio.ensure_future(take(db, 1))
    await asyncio.sleep(0.05)
    db.write_sync(lambda tx: tx.journal("t", "s", facts, namespace="default"))
    facts["yes"] = False
    [told] = await follower
    assert told.payload == {"colour": 3, "pair": [1, {"deep": [2.5, None]}], "yes": True, "text": facts["text"]}
    assert type(told.payload["colour"]) is int
    kept = db.journal._page(0, None)[0]
    assert kept == [told]


async def test_following_ends_when_the_database_closes(tmp_path: Path):
    db = Database(tmp_path / "z.db", [], durable=False)
    follower = asyncio.ensure_future(take(db, 1))
    await asyncio.sleep(0.05)
    db.close()
    assert await asyncio.wait_for(follower, 5) == []


# A loss of power


def cut_power(path: Path, after: Callable[[], object]) -> None:
    """What `after` has written is gone, as if the disk had never heard of it."""
    kept = {each: each.read_bytes() for each in path.parent.glob(f"{path.name}*")}
    after()
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink()
    for each, content in kept.items():
        each.write_bytes(content)


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def begin(name: str) -> None:
        (tmp_path / "boot_id").write_text(name)

    monkeypatch.setattr("corral.store.boots.BOOT_ID", tmp_path / "boot_id")
    begin("one")
    return begin


@pytest.mark.parametrize("namespace", [None, "default"])
async def test_who_was_told_of_events_that_a_loss_of_power_took_misses_none_that_come(
    tmp_path: Path, boot: Callable[[str], None], namespace: str | None
) -> None:
    path = tmp_path / "d" / "x.db"
    path.parent.mkdir()
    told: list[Event] = []
    db = Database(path, [], durable=False)
    add(db, "kept")
    cut_power(path, lambda: (add(db, "lost"), add(db, "lost, too"), db.close()))
    boot("two")
    with Database(path, [], durable=False) as db:
        add(db, "new")
        for cursor, before in ((0, ["kept"]), (1, []), (3, [])):
            events = await take(db, len(before) + 2, after=cursor, namespace=namespace)
            assert [event.subject for event in events] == [*before, "", "new"]
            gap, new = events[-2:]
            assert (gap.is_gap, new.seq) == (True, gap.seq + 1)
            assert new.seq > 3
        told = [page async for page in db.journal.pages(0, namespace=namespace, until_now=True)]
    assert [[event.subject for event in page] for page in told] == [["kept"], ["", "new"]]


@pytest.mark.parametrize("end", ["closed, and another boot", "killed in this boot"])
async def test_there_is_no_gap_where_nothing_can_be_lost(tmp_path: Path, boot: Callable[[str], None], end: str) -> None:
    path = tmp_path / "d" / "x.db"
    path.parent.mkdir()
    db = Database(path, [], durable=False)
    add(db, "kept")
    if end == "killed in this boot":
        cut_power(path, db.close)
    else:
        db.close()
        boot("two")
    with Database(path, [], durable=False) as db:
        assert add(db, "new") == 2
        assert [event.subject for event in await take(db, 2)] == ["kept", "new"]


async def test_pruning_counts_events_and_not_their_numbers(tmp_path: Path, boot: Callable[[str], None]) -> None:
    path = tmp_path / "d" / "x.db"
    path.parent.mkdir()
    db = Database(path, [], durable=False)
    add(db, "kept")
    cut_power(path, db.close)
    boot("two")
    with Database(path, [], durable=False, journal_keep=Retention(events=10)) as db:
        for n in range(5):
            add(db, str(n))
        db.prune_journal(Retention(events=10))
        assert [event.subject for event in await take(db, 7)] == ["kept", "", *"01234"]
