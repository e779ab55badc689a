"""The engine's rows: names, references, legal moves, volumes in use, exits of the right run, merged journals."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.api.engine.v1.engine_pb2 import ContainerConfig
from corral.api.types.v1.types_pb2 import Event, EventsResponse, ExitStatus, Gap
from corral.engine import merge, store, volume_rows
from corral.engine.core import apply_exit
from corral.engine.merge import write_merged_event
from corral.engine.records import ALLOWED, ContainerRecord, Status
from corral.engine.volume_rows import VolumeRecord
from corral.rpc.errors import AlreadyExists, FailedPrecondition, NotFound
from corral.store import JSON, Database, Duplicate, Referenced, Retention, Transaction

NS = "default"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with store.open_database(tmp_path / "engine.db", journal_keep=Retention()) as opened:
        yield opened


def record(id_: str = "a" * 64, name: str = "web", namespace: str = NS) -> ContainerRecord:
    return ContainerRecord(namespace, id_, name, Status.CREATING, ContainerConfig(image="busybox"), created_ns=1)


def volume(name: str, *, anonymous: bool = False) -> VolumeRecord:
    return VolumeRecord(NS, name, anonymous, 1, {"k": "v"}, {})


def insert(database: Database, *records: ContainerRecord, volumes: tuple[VolumeRecord, ...] = ()) -> None:
    for one in records:
        database.write_sync(lambda tx, one=one: store.insert_container(tx, one, volumes))


def running(database: Database, pid: int = 7) -> ContainerRecord:
    """A container that runs, as the engine's operations make one."""
    insert(database, record())
    return start(database, pid)


def start(database: Database, pid: int) -> ContainerRecord:
    def write(tx: Transaction) -> ContainerRecord:
        tx.execute("UPDATE container SET image_id = 'sha256:1', pid = ?", (pid,))
        store.save_started(tx, store.get(tx, NS, "a" * 64), by_user=True)
        return store.get(tx, NS, "a" * 64)

    return database.write_sync(write)


def topics(database: Database) -> list[str]:
    return [row[0] for row in database.read_sync(lambda view: view.execute("SELECT topic FROM journal ORDER BY seq"))]


def pages_written(database: Database) -> int:
    """To the log of changes, since it began."""
    log = Path(f"{database.path}-wal").read_bytes()
    page_bytes, salt = int.from_bytes(log[8:12], "big"), log[16:24]
    frames = range(32, len(log) - page_bytes, 24 + page_bytes)
    return sum(log[at + 8 : at + 16] == salt for at in frames)


def test_a_move_that_nobody_is_told_of_writes_one_page(database: Database) -> None:
    running(database)
    before = pages_written(database)
    database.write_sync(lambda tx: store.set_status(tx, NS, "a" * 64, Status.PAUSED))
    assert pages_written(database) - before == 1


def test_how_far_a_journal_has_been_merged_is_one_page(database: Database) -> None:
    database.write_sync(lambda tx: store.save_cursors(tx, {"tasks": store.Cursor(1)}))
    before = pages_written(database)
    database.write_sync(lambda tx: store.save_cursors(tx, {"tasks": store.Cursor(2)}))
    assert pages_written(database) - before == 1
    assert database.read_sync(store.cursors) == {"tasks": store.Cursor(2)}


# Names and references


def test_a_name_is_unique_in_its_namespace_and_free_again_after_removal(database: Database) -> None:
    insert(database, record(), record(namespace="other"))
    with pytest.raises(AlreadyExists, match="'web' is already in use by container aaaaaaaaaaaa"):
        insert(database, record("b" * 64))
    database.write_sync(lambda tx: store.delete_container(tx, record()))
    insert(database, record("b" * 64))


def test_an_id_is_unique_too(database: Database) -> None:
    insert(database, record())
    with pytest.raises(AlreadyExists, match="id aaaa"):
        insert(database, record(name="db"))


def test_a_container_is_found_by_id_name_and_unambiguous_prefix(database: Database) -> None:
    insert(database, record("abc1" * 16, "one"), record("abd2" * 16, "two"), record("x", "abc1"))

    def find(reference: str) -> str:
        return database.read_sync(lambda view: store.resolve(view, NS, reference)).id

    assert find("abc1" * 16) == find("one") == find("abc1a") == "abc1" * 16
    assert find("abc1") == "x", "a name goes before a prefix"
    with pytest.raises(FailedPrecondition, match=r"several container ids: abc1abc1abc1 \(one\), abd2"):
        find("ab")
    for nothing in ("", "zzz", "%", "ab_", "on"):
        with pytest.raises(NotFound):
            find(nothing)


def test_containers_of_two_namespaces_do_not_see_each_other(database: Database) -> None:
    insert(database, record())
    with pytest.raises(NotFound):
        database.read_sync(lambda view: store.resolve(view, "other", "web"))
    assert database.read_sync(lambda view: store.containers(view, "other")) == []


def test_rename_frees_the_old_name_and_refuses_a_taken_one(database: Database) -> None:
    insert(database, record(), record("b" * 64, "db"))
    with pytest.raises(AlreadyExists, match="'db'"):
        database.write_sync(lambda tx: store.rename(tx, NS, "a" * 64, "db"))
    assert database.write_sync(lambda tx: store.rename(tx, NS, "a" * 64, "www")).name == "www"
    insert(database, record("c" * 64, "web"))


@pytest.mark.parametrize(("status", "to"), list(itertools.product(Status, Status)))
def test_a_status_moves_only_along_the_table(database: Database, status: Status, to: Status) -> None:
    insert(database, record())
    database.write_sync(lambda tx: tx.execute("UPDATE container SET status = ?", (status,)))
    if to in ALLOWED[status]:
        assert database.write_sync(lambda tx: store.set_status(tx, NS, "a" * 64, to)).status is to
    else:
        with pytest.raises(FailedPrecondition, match=f"cannot become {to.word}"):
            database.write_sync(lambda tx: store.set_status(tx, NS, "a" * 64, to))


def test_a_row_comes_back_as_it_was_written(database: Database) -> None:
    insert(database, record())
    assert database.read_sync(lambda view: store.get(view, NS, "a" * 64)) == record()


# Exits


def ended(database: Database, pid: int, code: int = 3, *, started: bool = True) -> ContainerRecord | None:
    status = ExitStatus(code=code, known=True)
    return database.write_sync(lambda tx: apply_exit(tx, NS, "a" * 64, status, pid=pid, started=started))


def test_an_exit_is_taken_once_however_often_it_is_told(database: Database) -> None:
    running(database)
    first = ended(database, 7)
    assert first is not None
    assert first.status is Status.EXITED
    assert first.exit is not None
    assert first.exit.code == 3
    assert ended(database, 7, code=9) is None
    assert topics(database) == ["container.started", "container.died"]


def test_the_exit_of_an_earlier_run_does_not_end_the_present_one(database: Database) -> None:
    running(database, pid=7)
    ended(database, 7)
    start(database, pid=8)
    assert ended(database, 7) is None
    assert database.read_sync(lambda view: store.get(view, NS, "a" * 64)).status is Status.RUNNING
    assert ended(database, 8) is not None


def test_a_program_that_never_ran_dies_without_having_started(database: Database) -> None:
    running(database)
    assert ended(database, 7, code=127, started=False) is not None
    assert topics(database) == ["container.died"]


def test_an_exit_of_an_unknown_container_is_nobodys(database: Database) -> None:
    assert ended(database, 7) is None


def test_a_container_that_was_never_created_is_not_reported_as_removed(database: Database) -> None:
    insert(database, record())
    database.write_sync(lambda tx: store.delete_container(tx, record()))
    assert topics(database) == []


# What a power loss leaves


def with_parts(database: Database, *, boot: str | None = None) -> ContainerRecord:
    """A container that is CREATING and has its parts, of this boot of the machine or another."""
    insert(database, record())
    database.write_sync(lambda tx: store.save_parts(tx, record()._replace(image_id="sha256:1")))
    if boot is not None:
        database.write_sync(lambda tx: tx.execute("UPDATE container SET made_in_boot = ?", (boot,)))
    return database.read_sync(lambda view: store.get(view, NS, "a" * 64))


def test_one_that_had_its_parts_when_the_machine_died_is_created(database: Database) -> None:
    with_parts(database, boot="an earlier one")
    [kept] = database.write_sync(store.keep_created)
    assert (kept.status, kept.image_id) == (Status.CREATED, "sha256:1")
    assert database.read_sync(lambda view: store.get(view, NS, "a" * 64)) == kept
    assert topics(database) == ["container.created"]
    assert database.write_sync(store.keep_created) == []


def test_one_whose_engine_alone_died_is_not_and_nobody_is_told_of_its_end(database: Database) -> None:
    found = with_parts(database)
    assert database.write_sync(store.keep_created) == []
    database.write_sync(lambda tx: store.delete_container(tx, found))
    assert topics(database) == []


def test_nor_is_one_that_was_not_to_be_created_after_all(database: Database) -> None:
    found = with_parts(database, boot="an earlier one")
    database.write_sync(lambda tx: store.forget_parts(tx, found))
    assert database.write_sync(store.keep_created) == []


# Volumes


def test_a_volume_in_use_cannot_be_deleted(database: Database) -> None:
    insert(database, record(), volumes=(volume("data"),))
    with pytest.raises(Referenced):
        database.write_sync(lambda tx: volume_rows.delete_volume(tx, NS, "data"))
    assert database.read_sync(lambda view: volume_rows.get_volume(view, NS, "data")).containers == ("a" * 64,)
    database.write_sync(lambda tx: store.delete_container(tx, record()))
    database.write_sync(lambda tx: volume_rows.delete_volume(tx, NS, "data"))
    with pytest.raises(NotFound):
        database.read_sync(lambda view: volume_rows.get_volume(view, NS, "data"))


def test_anonymous_volumes_go_with_their_container_unless_another_uses_them(database: Database) -> None:
    insert(
        database, record(), volumes=(volume("named"), volume("mine", anonymous=True), volume("ours", anonymous=True))
    )
    insert(database, record("b" * 64, "db"), volumes=(volume("ours", anonymous=True),))
    removed = database.write_sync(lambda tx: volume_rows.delete_anonymous_volumes(tx, NS, "a" * 64))
    assert removed == ["mine"]
    left = database.read_sync(lambda view: volume_rows.volumes(view, NS))
    assert [(one.name, one.containers) for one in left] == [("named", ()), ("ours", ("b" * 64,))]


def test_a_volume_keeps_what_it_was_made_with(database: Database) -> None:
    database.write_sync(lambda tx: volume_rows.insert_volume(tx, volume("data")))
    assert database.read_sync(lambda view: volume_rows.get_volume(view, NS, "data")) == volume("data")
    with pytest.raises(Duplicate):
        database.write_sync(lambda tx: volume_rows.insert_volume(tx, volume("data")))


# Merging


def arrived(seq: int, topic: str = "task.created", *, time_us: int = 0, **payload: JSON) -> merge.Arrived:
    event = Event(seq=seq, namespace=NS, topic=topic, subject="a" * 64)
    event.time.FromMicroseconds(time_us or seq)
    event.payload.update(payload)
    return merge.Arrived("tasks", EventsResponse(events=[event]))


def append(database: Database, *batch: merge.Arrived) -> tuple[list[ContainerRecord], set[str]]:
    return database.write_sync(lambda tx: merge.append(tx, batch))


def test_an_event_is_merged_exactly_once(database: Database) -> None:
    append(database, arrived(1), arrived(2))
    append(database, arrived(1), arrived(2), arrived(3))
    rows = database.read_sync(lambda view: view.execute("SELECT count(*) FROM journal"))
    assert rows[0][0] == 3
    assert database.read_sync(lambda view: store.cursor(view, "tasks").seq) == 3


def test_a_message_of_several_events_is_merged_in_order_after_its_gap(database: Database) -> None:
    events = [arrived(seq, f"task.t{seq}").response.events[0] for seq in (7, 8)]
    response = EventsResponse(events=events, gap=Gap(resumes_at=7))
    for _ in range(2):
        append(database, merge.Arrived("tasks", response))
    assert topics(database)[:3] == ["journal.gap", "task.t7", "task.t8"]
    assert topics(database).count("task.t8") == 1


def test_a_merged_event_keeps_its_time_facts_and_origin(database: Database) -> None:
    append(database, arrived(5, pid=7, ratio=0.5, nested={"list": [1, None, True]}))
    [row] = database.read_sync(lambda view: view.execute("SELECT * FROM journal"))
    from corral.store import Event as Row

    event = Event()
    write_merged_event(event, Row(*row))
    assert (event.seq, event.origin, event.origin_seq, event.time.ToNanoseconds()) == (1, "tasks", 5, 5000)
    assert merge.struct_to_json(event.payload) == {"pid": 7, "ratio": 0.5, "nested": {"list": [1, None, True]}}


def test_a_payload_that_came_as_text_is_merged_as_the_same_facts_with_its_origin(database: Database) -> None:
    as_text, without_facts = arrived(5), arrived(6)
    as_text.response.events[0].payload_json = '{"pid":7,"exited_at_ns":1790000000123456789,"origin":"here"}'
    without_facts.response.events[0].payload_json = "{}"
    append(database, as_text, without_facts)
    rows = database.read_sync(lambda view: view.execute("SELECT payload FROM journal ORDER BY seq"))
    assert [json.loads(row["payload"]) for row in rows] == [
        {"@origin": ["tasks", 5, 5000], "pid": 7, "exited_at_ns": 1790000000123456789, "origin": "here"},
        {"@origin": ["tasks", 6, 6000]},
    ]


def test_an_exit_that_came_as_text_ends_the_container(database: Database) -> None:
    running(database, pid=7)
    exited = arrived(1, "task.exited")
    exited.response.events[0].payload_json = '{"pid":7,"code":3,"signal":0}'
    ends, _ = append(database, exited)
    assert [one.exit.code for one in ends if one.exit is not None] == [3]


def test_a_merged_exit_ends_the_container_in_the_same_transaction(database: Database) -> None:
    running(database, pid=7)
    ends, _ = append(
        database,
        arrived(1, "task.started", pid=7),
        arrived(2, "task.exited", pid=7, code=137, signal=9, oom=True, exited_at_ns=5_000_000_000),
    )
    assert [one.id for one in ends] == ["a" * 64]
    now = database.read_sync(lambda view: store.get(view, NS, "a" * 64))
    assert now.exit is not None
    assert (now.status, now.exit.code, now.exit.signal, now.exit.oom_killed) == (Status.EXITED, 137, 9, True)
    assert now.finished_ns == 5_000_000_000
    assert topics(database) == ["task.started", "container.started", "task.exited", "container.died"]


def test_a_gap_is_reported_and_never_silent(database: Database) -> None:
    append(database, arrived(1))
    _, gaps = append(database, merge.Arrived("tasks", EventsResponse(gap=Gap(resumes_at=100))), arrived(100))
    assert gaps == {"tasks"}
    assert topics(database) == ["task.created", "journal.gap", "task.created"]
    assert database.read_sync(lambda view: store.cursor(view, "tasks").seq) == 100


def test_a_journal_that_began_anew_is_merged_but_for_what_is_known(database: Database) -> None:
    append(database, arrived(99), arrived(100))
    _, gaps = append(database, merge.Arrived("tasks", EventsResponse(gap=Gap(resumes_at=1))))
    assert gaps == {"tasks"}
    old = [arrived(1, time_us=99), arrived(2, time_us=100)]
    append(database, *old, arrived(3, "task.exited", time_us=101))
    append(database, arrived(4, "task.deleted", time_us=102))
    assert topics(database) == ["task.created"] * 2 + ["journal.gap", "task.exited", "task.deleted"]
    assert database.read_sync(lambda view: store.cursor(view, "tasks").seq) == 4
