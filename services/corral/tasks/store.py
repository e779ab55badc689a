"""The rows of tasks and their processes. Every change of state and its journal row are one transaction.

tasks.db is run state: no power loss leaves a container that a lost row could describe.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from corral.store import JSON, Row, Snapshot, Transaction
from corral.tasks.model import Exit, LogRow, ProcessRow, Status, TaskKey, TaskRow, origins

MIGRATIONS = (
    """
    CREATE TABLE tasks (
        namespace TEXT NOT NULL,
        id TEXT NOT NULL,
        created_at_ns INTEGER NOT NULL,
        shim_pid INTEGER NOT NULL,
        shim_start_time INTEGER NOT NULL,
        ooms INTEGER NOT NULL DEFAULT 0,
        create_request TEXT NOT NULL,
        log TEXT NOT NULL,
        cgroup_paths TEXT NOT NULL,
        labels TEXT NOT NULL,
        PRIMARY KEY (namespace, id)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE processes (
        namespace TEXT NOT NULL,
        task_id TEXT NOT NULL,
        exec_id TEXT NOT NULL,
        status INTEGER NOT NULL CHECK (status IN (1, 2, 3)),
        pid INTEGER NOT NULL,
        start_time INTEGER NOT NULL,
        args TEXT NOT NULL,
        terminal INTEGER NOT NULL,
        stdin INTEGER NOT NULL,
        stdin_once INTEGER NOT NULL,
        started_at_ns INTEGER,
        exit TEXT CHECK ((exit IS NOT NULL) = (status = 3)),
        PRIMARY KEY (namespace, task_id, exec_id),
        FOREIGN KEY (namespace, task_id) REFERENCES tasks (namespace, id) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID
    """,
    "ALTER TABLE processes ADD COLUMN forget INTEGER NOT NULL DEFAULT 0",
)

_TASK_COLUMNS = "namespace, id, created_at_ns, shim_pid, shim_start_time, create_request, log, cgroup_paths, labels"
_PROCESS_COLUMNS = (
    "namespace, task_id, exec_id, status, pid, start_time, args, terminal, stdin, stdin_once, forget, started_at_ns,"
    " exit"
)


_MOVES = {
    target: "UPDATE processes SET status = ?, pid = ?, start_time = ?, forget = ?, started_at_ns = ?, exit = ?"  # noqa: S608
    " WHERE namespace = ? AND task_id = ? AND exec_id = ?"
    f" AND status IN ({', '.join(str(int(status)) for status in origins(target))}) RETURNING status"
    for target in Status
}
"""To a state, from where the table of moves allows it."""


@dataclass(frozen=True, slots=True)
class StoredTask:
    """A task and its processes, init among them, as they were written last."""

    task: TaskRow
    processes: tuple[ProcessRow, ...]


def insert_task(transaction: Transaction, task: TaskRow, init: ProcessRow) -> None:
    """A task that was created. Raises corral.store.Duplicate."""
    log = {name: getattr(task.log, name) for name in LogRow.__slots__}
    transaction.execute(
        f"INSERT INTO tasks ({_TASK_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)",  # noqa: S608 (a constant)
        (
            task.key.namespace,
            task.key.id,
            task.created_at_ns,
            task.shim_pid,
            task.shim_start_time,
            task.create,
            json.dumps(log),
            json.dumps(task.cgroup_paths),
            json.dumps(dict(task.labels)),
        ),
    )
    _insert_process(transaction, init)
    _journal(transaction, task.key, "task.created", {"pid": init.pid, "shim_pid": task.shim_pid})


def adopted(transaction: Transaction, task: TaskRow) -> None:
    """Another shim looks after the task, as its row says."""
    rows = transaction.execute(
        "UPDATE tasks SET shim_pid = ?, shim_start_time = ? WHERE namespace = ? AND id = ? RETURNING id",
        (task.shim_pid, task.shim_start_time, task.key.namespace, task.key.id),
    )
    if rows:
        _journal(transaction, task.key, "task.adopted", {"shim_pid": task.shim_pid})


def insert_exec(transaction: Transaction, process: ProcessRow) -> None:
    """An exec that the shim knows now. Raises corral.store.Duplicate, corral.store.Referenced (no such task)."""
    _insert_process(transaction, process)


def started(transaction: Transaction, process: ProcessRow) -> None:
    """The process runs, as its row says."""
    if _move(transaction, process):
        _journal_start(transaction, process)


def _journal_start(transaction: Transaction, process: ProcessRow) -> None:
    payload: dict[str, JSON] = {"pid": process.pid, "started_at_ns": process.started_at_ns}
    _journal_process(transaction, process, "started", payload, process.started_at_ns)


def ended(transaction: Transaction, process: ProcessRow) -> None:
    """The process has ended, as its row says; journalled at most once, however often it is reported."""
    if _move(transaction, process):
        _journal_end(transaction, process)


def ran(transaction: Transaction, process: ProcessRow, how: Exit) -> None:
    """A process without a row of its own was run, and ended so; if it has a pid, it was started before."""
    if process.pid:
        _journal_start(transaction, process)
    _journal_end(transaction, process.ended(how))


def _journal_end(transaction: Transaction, process: ProcessRow) -> None:
    how = process.exit
    assert how is not None
    if how.oom:
        out_of_memory(transaction, process.task, kills=1, at_ns=how.exited_at_ns)
    payload: dict[str, JSON] = {"pid": process.pid} | {name: getattr(how, name) for name in Exit.__slots__}
    payload["reason"] = how.sentence
    _journal_process(transaction, process, "exited", payload, how.exited_at_ns)


def out_of_memory(transaction: Transaction, key: TaskKey, *, kills: int, at_ns: int) -> None:
    """The kernel has killed so many processes of the task for memory by now; journalled if that is news."""
    rows = transaction.execute(
        "UPDATE tasks SET ooms = ? WHERE namespace = ? AND id = ? AND ooms < ? RETURNING ooms",
        (kills, key.namespace, key.id, kills),
    )
    if rows:
        _journal(transaction, key, "task.oom", {"kills": kills}, at_ns)


def delete_task(transaction: Transaction, key: TaskKey) -> None:
    """Forget a task and its processes."""
    rows = transaction.execute("DELETE FROM tasks WHERE namespace = ? AND id = ? RETURNING id", (key.namespace, key.id))
    if rows:
        _journal(transaction, key, "task.deleted", {})


def delete_exec(transaction: Transaction, process: ProcessRow) -> None:
    """Forget one exec."""
    transaction.execute(
        "DELETE FROM processes WHERE namespace = ? AND task_id = ? AND exec_id = ?",
        (process.task.namespace, process.task.id, process.exec_id),
    )


def load(snapshot: Snapshot) -> list[StoredTask]:
    """Everything, for start-up."""
    processes: dict[TaskKey, list[ProcessRow]] = {}
    for row in snapshot.execute(f"SELECT {_PROCESS_COLUMNS} FROM processes"):  # noqa: S608
        process = _process(row)
        processes.setdefault(process.task, []).append(process)
    tasks = [_task(row) for row in snapshot.execute(f"SELECT {_TASK_COLUMNS} FROM tasks")]  # noqa: S608
    return [StoredTask(task, tuple(processes.get(task.key, ()))) for task in tasks]


def _insert_process(transaction: Transaction, process: ProcessRow) -> None:
    transaction.execute(
        f"INSERT INTO processes ({_PROCESS_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",  # noqa: S608
        (
            process.task.namespace,
            process.task.id,
            process.exec_id,
            process.status,
            process.pid,
            process.start_time,
            json.dumps(process.args),
            process.terminal,
            process.stdin,
            process.stdin_once,
            process.forget,
            process.started_at_ns,
            None if process.exit is None else process.exit.to_json(),
        ),
    )


def _move(transaction: Transaction, process: ProcessRow) -> bool:
    """Bring the row to process's state, if the table of moves allows it from the state that is stored."""
    rows = transaction.execute(
        _MOVES[process.status],
        (
            process.status,
            process.pid,
            process.start_time,
            process.forget,
            process.started_at_ns,
            None if process.exit is None else process.exit.to_json(),
            process.task.namespace,
            process.task.id,
            process.exec_id,
        ),
    )
    return bool(rows)


def _journal_process(
    transaction: Transaction, process: ProcessRow, happened: str, payload: Mapping[str, JSON], at_ns: int | None
) -> None:
    topic = f"task.{happened}" if process.is_init else f"task.exec.{happened}"
    _journal(transaction, process.task, topic, {**_exec_of(process), **payload}, at_ns)


def _exec_of(process: ProcessRow) -> dict[str, JSON]:
    return {} if process.is_init else {"exec_id": process.exec_id}


def _journal(
    transaction: Transaction, key: TaskKey, topic: str, payload: Mapping[str, JSON], at_ns: int | None = None
) -> None:
    """`at_ns`: when it happened, which may have been while this service was down."""
    transaction.journal(topic, key.id, payload, namespace=key.namespace, time_ns=at_ns)


def _task(row: Row) -> TaskRow:
    return TaskRow(
        key=TaskKey(row["namespace"], row["id"]),
        created_at_ns=row["created_at_ns"],
        shim_pid=row["shim_pid"],
        shim_start_time=row["shim_start_time"],
        create=row["create_request"],
        log=LogRow(**json.loads(row["log"])),
        cgroup_paths=tuple(json.loads(row["cgroup_paths"])),
        labels=json.loads(row["labels"]),
    )


def _process(row: Row) -> ProcessRow:
    return ProcessRow(
        task=TaskKey(row["namespace"], row["task_id"]),
        exec_id=row["exec_id"],
        status=Status(row["status"]),
        pid=row["pid"],
        start_time=row["start_time"],
        args=tuple(json.loads(row["args"])),
        terminal=bool(row["terminal"]),
        stdin=bool(row["stdin"]),
        stdin_once=bool(row["stdin_once"]),
        forget=bool(row["forget"]),
        started_at_ns=row["started_at_ns"],
        exit=None if row["exit"] is None else Exit.from_json(row["exit"]),
    )
