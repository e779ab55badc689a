"""The states of a process, and the rows that keep them."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from corral.store import Database, Duplicate, Referenced
from corral.tasks import store
from corral.tasks.bundle import Bundles
from corral.tasks.live import Process, Task
from corral.tasks.model import ALLOWED, Exit, LogRow, ProcessRow, Status, TaskKey, TaskRow, origins

KEY = TaskKey("default", "c1")
TASK = TaskRow(
    key=KEY,
    created_at_ns=1,
    shim_pid=10,
    shim_start_time=11,
    create="{}",
    log=LogRow("json-file", "/log", 1, 2),
    cgroup_paths=("/sys/fs/cgroup/x",),
    labels={"a": "b"},
)
INIT = ProcessRow(task=KEY, exec_id="", pid=20, start_time=21, args=("sh", "-c"), stdin=True)
HOW = Exit(code=3, exited_at_ns=99)


@pytest.fixture
def db(tmp_path: Path):
    with Database(tmp_path / "tasks.db", store.MIGRATIONS, durable=False) as database:
        yield database


def topics(db: Database) -> list[str]:
    return [row["topic"] for row in db.read_sync(lambda s: s.execute("SELECT topic FROM journal ORDER BY seq"))]


def test_every_status_has_its_moves_and_stopped_is_final():
    assert set(ALLOWED) == set(Status)
    assert ALLOWED[Status.STOPPED] == frozenset()
    assert origins(Status.STOPPED) == (Status.CREATED, Status.RUNNING)
    assert origins(Status.RUNNING) == (Status.CREATED,)
    with pytest.raises(AssertionError):
        INIT.ended(HOW).started(pid=1, start_time=1, at_ns=1)


def test_a_task_is_settled_when_the_last_that_was_to_be_found_out_is(tmp_path: Path):
    """A shim may go away while it is still being found out what has become of the one before."""
    task = Task(TASK, Bundles(tmp_path / "state", tmp_path / "root").of(KEY), [Process(INIT)])
    task.unsettle()
    task.unsettle()
    task.settle()
    assert not task.settled.is_set()
    task.settle()
    assert task.settled.is_set()


def test_an_exit_survives_the_database_and_reads_what_shims_write():
    assert Exit.from_json(HOW.to_json()) == HOW
    record = {
        "v": 1, "exec": "", "code": 137, "signal": 9, "oom": True, "started_at_ns": 5, "exited_at_ns": 6,
        "dropped_bytes": 7, "reason": "", "future": {"unknown": 1},
    }  # fmt: skip
    exit_ = Exit.from_shim(record)
    assert (exit_.code, exit_.signal, exit_.oom, exit_.started_at_ns, exit_.dropped_bytes) == (137, 9, True, 5, 7)
    for bad in ({}, {"code": "0", "exited_at_ns": 1}, {"code": 0}):
        with pytest.raises(ValueError, match="record of an exit"):
            Exit.from_shim(bad)


def test_an_end_that_a_loss_of_power_has_emptied_is_one_that_nobody_saw(tmp_path: Path):
    """An exec's is not waited for until it is on disk; its name may be there without it."""
    bundle = Bundles(tmp_path, tmp_path).of(KEY)
    execs = bundle.path / "execs"
    execs.mkdir(parents=True)
    (execs / "e1.json").touch()
    assert bundle.exec_exit("e1") is None


def test_an_unknown_exit_is_marked_as_such():
    how = Exit.unknown("why", exited_at_ns=1)
    assert (how.code, how.known, how.reason) == (255, False, "why")


def test_tasks_are_read_back_as_they_were_written(db: Database):
    db.write_sync(lambda tx: store.insert_task(tx, TASK, INIT))
    exec_row = ProcessRow(task=KEY, exec_id="e", args=("ls",), terminal=True)
    db.write_sync(lambda tx: store.insert_exec(tx, exec_row))
    [stored] = db.read_sync(store.load)
    assert stored.task == TASK
    assert set(stored.processes) == {INIT, exec_row}
    with pytest.raises(Duplicate):
        db.write_sync(lambda tx: store.insert_task(tx, TASK, INIT))
    with pytest.raises(Referenced):
        db.write_sync(lambda tx: store.insert_exec(tx, replace(exec_row, task=TaskKey("default", "other"))))


def test_each_move_is_journalled_once_however_often_it_is_told(db: Database):
    db.write_sync(lambda tx: store.insert_task(tx, TASK, INIT))
    running = INIT.started(pid=20, start_time=21, at_ns=50)
    ended = running.ended(replace(HOW, oom=True))
    for _ in range(2):
        db.write_sync(lambda tx: store.started(tx, running))
    for _ in range(2):
        db.write_sync(lambda tx: store.ended(tx, ended))
    db.write_sync(lambda tx: store.started(tx, running))
    [stored] = db.read_sync(store.load)
    assert stored.processes == (ended,)
    for _ in range(2):
        db.write_sync(lambda tx: store.delete_task(tx, KEY))
    assert db.read_sync(store.load) == []
    assert topics(db) == ["task.created", "task.started", "task.oom", "task.exited", "task.deleted"]


def test_a_task_that_survives_running_out_of_memory_is_told_about_each_time(db: Database):
    db.write_sync(lambda tx: store.insert_task(tx, TASK, INIT))
    for kills in (1, 1, 3, 2):
        db.write_sync(lambda tx, kills=kills: store.out_of_memory(tx, KEY, kills=kills, at_ns=5))
    db.write_sync(lambda tx: store.ended(tx, INIT.ended(replace(HOW, oom=True))))
    assert topics(db) == ["task.created", "task.oom", "task.oom", "task.exited"]


def test_execs_go_with_their_task(db: Database):
    db.write_sync(lambda tx: store.insert_task(tx, TASK, INIT))
    exec_row = ProcessRow(task=KEY, exec_id="e")
    db.write_sync(lambda tx: store.insert_exec(tx, exec_row))
    db.write_sync(lambda tx: store.started(tx, exec_row.started(pid=5, start_time=6, at_ns=7)))
    db.write_sync(lambda tx: store.delete_task(tx, KEY))
    assert db.read_sync(lambda s: s.execute("SELECT * FROM processes")) == []
    assert topics(db) == ["task.created", "task.exec.started", "task.deleted"]


async def test_a_stdin_that_is_closed_before_its_copy_is_kept_is_not_kept_open():
    reader, writer = os.pipe2(os.O_NONBLOCK)
    process = Process(ProcessRow(task=TaskKey("default", "t"), exec_id="e", stdin=True))
    process.stdin_closed()
    process.keep({"stdin": writer})
    assert os.read(reader, 1) == b""
    os.close(reader)
