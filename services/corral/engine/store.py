"""The engine's rows: containers, volumes and who uses them, and how far each leaf's journal has been merged.

What a user would miss after a power loss is on disk before they are told: that a container was created, renamed,
updated or is being removed, and of one with a restart policy that they have started it. Else, what follows from the
tasks leaf (started, exited, paused) is not worth waiting for the disk, and a power loss ends the containers anyway.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from corral.api.engine.v1.engine_pb2 import ContainerConfig
from corral.api.network.v1.network_pb2 import Endpoint
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine import pauses, secret_rows
from corral.engine.records import ALLOWED, ContainerRecord, Status
from corral.engine.volume_rows import VolumeRecord, use_volumes
from corral.rpc.errors import AlreadyExists, FailedPrecondition, NotFound
from corral.store import JSON, Database, Duplicate, Referenced, Retention, Row, Snapshot, Transaction, boot_id

MIGRATIONS: Sequence[str] = (
    """
CREATE TABLE namespace (name TEXT PRIMARY KEY) STRICT;
CREATE TABLE container (
    namespace TEXT NOT NULL REFERENCES namespace(name),
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    status INTEGER NOT NULL,
    config BLOB NOT NULL,           -- corral.engine.v1.ContainerConfig
    created_ns INTEGER NOT NULL,
    started_ns INTEGER NOT NULL,    -- 0: never
    finished_ns INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    announced INTEGER NOT NULL DEFAULT 1,  -- 0: no event has told yet that the present run began
    exit BLOB,                      -- corral.types.v1.ExitStatus
    image_id TEXT NOT NULL,
    endpoint BLOB,                  -- corral.network.v1.Endpoint
    cgroup_path TEXT NOT NULL,
    log_path TEXT NOT NULL,
    bundle TEXT NOT NULL,
    snapshot_driver TEXT NOT NULL,
    restart_count INTEGER NOT NULL,
    removing_volumes INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (namespace, id),
    UNIQUE (namespace, name)
) STRICT;
CREATE INDEX container_status ON container (status);
CREATE TABLE volume (
    namespace TEXT NOT NULL REFERENCES namespace(name),
    name TEXT NOT NULL,
    anonymous INTEGER NOT NULL,
    labels TEXT NOT NULL,
    options TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, name)
) STRICT;
CREATE TABLE volume_use (
    namespace TEXT NOT NULL,
    volume TEXT NOT NULL,
    container TEXT NOT NULL,
    PRIMARY KEY (namespace, volume, container),
    FOREIGN KEY (namespace, volume) REFERENCES volume (namespace, name) ON DELETE RESTRICT,
    FOREIGN KEY (namespace, container) REFERENCES container (namespace, id) ON DELETE CASCADE
) STRICT;
CREATE INDEX volume_use_container ON volume_use (namespace, container);
CREATE TABLE merged (
    origin TEXT PRIMARY KEY,
    seq INTEGER NOT NULL,           -- the last one that is in our journal
    time_ns INTEGER NOT NULL,       -- when that happened
    known_until_ns INTEGER NOT NULL -- after a power loss cost the leaf its newest rows: older events are known already
) STRICT;
""",
    "ALTER TABLE container ADD COLUMN stopped_by_user INTEGER NOT NULL DEFAULT 0",
    pauses.SCHEMA,
    secret_rows.SCHEMA,
    # A start that tasks tells of and no row, since the engine was killed before it wrote that, is told all the same.
    f"UPDATE container SET announced = 0 WHERE status = {int(Status.CREATED)}",  # noqa: S608 (a constant)
    # A restart by its policy was begun, and counted, and nothing is known yet of how that went.
    "ALTER TABLE container ADD COLUMN retrying INTEGER NOT NULL DEFAULT 0",
    # Of one that is CREATING and knows its parts: which boot of the machine they were made in.
    "ALTER TABLE container ADD COLUMN made_in_boot TEXT NOT NULL DEFAULT ''",
    # Every move wrote a page of it, seven in a life, and what asks for a status looks at most containers anyway.
    "DROP INDEX container_status",
)

_COLUMNS = ", ".join(ContainerRecord._fields)
_SELECT = f"SELECT {_COLUMNS} FROM container"  # noqa: S608 (constants)
_INSERT = f"INSERT INTO container ({_COLUMNS}) VALUES ({', '.join('?' * 19)})"  # noqa: S608


def open_database(path: Path, *, journal_keep: Retention) -> Database:
    """The engine's database, made if it is not there. Its followers are told at once: what is merged has waited."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Database(path, MIGRATIONS, durable=False, on_loop=True, journal_keep=journal_keep, journal_delay_s=0)


# Containers


def insert_container(tx: Transaction, record: ContainerRecord, volumes: Iterable[VolumeRecord]) -> None:
    """The intent to create a container, with the volumes that it uses; those that are missing are made.

    Raises AlreadyExists if the id or the name is taken.
    """
    try:
        _insert(tx, record)
    except Duplicate as e:
        raise _taken(tx, record) from e
    except Referenced:  # the first of its namespace
        tx.execute("INSERT INTO namespace VALUES (?)", (record.namespace,))
        _insert(tx, record)
    use_volumes(tx, record.namespace, record.id, volumes)
    secret_rows.use_secrets(tx, record.namespace, record.id, {mount.secret for mount in record.config.secrets})


def _insert(tx: Transaction, record: ContainerRecord) -> None:
    tx.execute(
        _INSERT,
        (
            record.namespace,
            record.id,
            record.name,
            record.status,
            record.config.SerializeToString(),
            record.created_ns,
            record.started_ns,
            record.finished_ns,
            record.pid,
            None,
            record.image_id,
            None,
            record.cgroup_path,
            record.log_path,
            record.bundle,
            record.snapshot_driver,
            record.restart_count,
            int(record.stopped_by_user),
            int(record.retrying),
        ),
    )


def _taken(tx: Snapshot, record: ContainerRecord) -> AlreadyExists:
    holder = tx.one(
        "SELECT id, status FROM container WHERE namespace = ? AND name = ?", (record.namespace, record.name)
    )
    if holder is None:
        return AlreadyExists(f"a container with id {record.id} exists already", reason="ID_TAKEN")
    return AlreadyExists(
        f"the name {record.name!r} is already in use by container {holder['id'][:12]}"
        f" ({Status(holder['status']).word}): remove or rename that one, or choose another name",
        reason="NAME_TAKEN",
        metadata={"container": holder["id"]},
    )


def save_parts(tx: Transaction, record: ContainerRecord) -> None:
    """What the leaves answered, for one that is still CREATING; see keep_created()."""
    _save_parts(tx, record, boot_id())


def forget_parts(tx: Transaction, record: ContainerRecord) -> None:
    """It is not to be created after all, whatever befalls the machine."""
    tx.execute(
        "UPDATE container SET made_in_boot = '' WHERE namespace = ? AND id = ? AND made_in_boot <> ''",
        (record.namespace, record.id),
    )


def perhaps_created(view: Snapshot) -> list[ContainerRecord]:
    """Those that are CREATING, and had their parts when the machine died: users may have been told that they are
    created."""
    rows = view.execute(f"{_SELECT} WHERE status = ? AND made_in_boot NOT IN ('', ?)", (Status.CREATING, boot_id()))
    return [_record(row) for row in rows]


def keep_created(tx: Transaction) -> list[ContainerRecord]:
    """CREATING -> CREATED, of those whose users may know them so; see perhaps_created(). Their tasks died with the
    machine, as those of all others."""
    kept = [record._replace(status=Status.CREATED) for record in perhaps_created(tx)]
    for record in kept:
        save_created(tx, record)
    return kept


def save_created(tx: Transaction, record: ContainerRecord) -> None:
    """CREATING -> CREATED, with all that the leaves answered."""
    _save_parts(tx, record, "")
    facts = {"name": record.name, "image": record.config.image}
    tx.journal("container.created", record.id, facts, namespace=record.namespace)


def _save_parts(tx: Transaction, record: ContainerRecord, boot: str) -> None:
    tx.execute(
        "UPDATE container SET status = ?, config = ?, pid = ?, image_id = ?, endpoint = ?, cgroup_path = ?,"
        " log_path = ?, bundle = ?, snapshot_driver = ?, announced = 0, made_in_boot = ?"
        " WHERE namespace = ? AND id = ?",
        (
            record.status,
            record.config.SerializeToString(),
            record.pid,
            record.image_id,
            record.endpoint.SerializeToString() if record.endpoint else None,
            record.cgroup_path,
            record.log_path,
            record.bundle,
            record.snapshot_driver,
            boot,
            record.namespace,
            record.id,
        ),
    )


def set_status(tx: Transaction, namespace: str, id_: str, status: Status) -> ContainerRecord:
    """Make a legal move; returns the record as it is then. Raises NotFound, FailedPrecondition."""
    record = get(tx, namespace, id_)
    check_move(record, status)
    tx.execute("UPDATE container SET status = ? WHERE namespace = ? AND id = ?", (status, namespace, id_))
    return record._replace(status=status)


def set_removing(tx: Transaction, found: ContainerRecord, *, volumes: bool) -> None:
    """Any status -> REMOVING, with its anonymous volumes or without. found: as this transaction has it."""
    check_move(found, Status.REMOVING)
    tx.execute(
        "UPDATE container SET status = ?, removing_volumes = ? WHERE namespace = ? AND id = ?",
        (Status.REMOVING, int(volumes), found.namespace, found.id),
    )


def is_removing_volumes(view: Snapshot, namespace: str, id_: str) -> bool:
    """Whether a removal that was begun takes the anonymous volumes with it."""
    row = view.one("SELECT removing_volumes FROM container WHERE namespace = ? AND id = ?", (namespace, id_))
    return row is not None and bool(row[0])


def save_started(tx: Transaction, record: ContainerRecord, *, by_user: bool) -> None:
    """CREATED or EXITED -> RUNNING, before tasks is told to start it, so that no exit can come first.

    Only a user's start forgets that a user stopped it: one by its policy may have been overtaken by that.
    """
    forgotten = "stopped_by_user = 0, retrying = 0, " if by_user else ""
    tx.execute(
        f"UPDATE container SET {forgotten}announced = CASE status WHEN ? THEN announced ELSE 0 END,"  # noqa: S608
        " status = ?, started_ns = ?, finished_ns = 0, pid = ?, exit = NULL,"
        " endpoint = ?, cgroup_path = ?, log_path = ?, bundle = ?, restart_count = ?"
        " WHERE namespace = ? AND id = ?",
        (
            Status.CREATED,  # tasks may have told already
            Status.RUNNING,
            record.started_ns,
            record.pid,
            record.endpoint.SerializeToString() if record.endpoint else None,
            record.cgroup_path,
            record.log_path,
            record.bundle,
            record.restart_count,
            record.namespace,
            record.id,
        ),
    )


def save_made_again(tx: Transaction, record: ContainerRecord) -> ContainerRecord:
    """EXITED -> CREATED, with the new task; one that was CREATED gets another task. No policy wants it started."""
    if (now := get(tx, record.namespace, record.id)).status is not Status.CREATED:
        check_move(now, Status.CREATED)
    tx.execute(
        "UPDATE container SET status = ?, pid = ?, endpoint = ?, cgroup_path = ?, log_path = ?, bundle = ?,"
        " announced = 0, restart_count = 0, retrying = 0 WHERE namespace = ? AND id = ?",
        (
            Status.CREATED,
            record.pid,
            record.endpoint.SerializeToString() if record.endpoint else None,
            record.cgroup_path,
            record.log_path,
            record.bundle,
            record.namespace,
            record.id,
        ),
    )
    return record


def announce_started(tx: Transaction, record: ContainerRecord) -> None:
    """Journal that the present run began, once. Called when tasks tells so, or tells of its end."""
    rows = tx.execute(
        "UPDATE container SET announced = 1, retrying = 0 WHERE namespace = ? AND id = ? AND announced = 0"
        " RETURNING id",
        (record.namespace, record.id),
    )
    if rows:
        facts: dict[str, JSON] = {"name": record.name, "image": record.config.image, "pid": record.pid}
        tx.journal("container.started", record.id, facts, namespace=record.namespace)


def take_back_start(tx: Transaction, namespace: str, id_: str) -> bool:
    """RUNNING -> CREATED, if that was but the intent: tasks has told of no start. Its journal must have been merged, or
    its task be gone."""
    rows = tx.execute(
        "UPDATE container SET status = ? WHERE namespace = ? AND id = ? AND status = ? AND announced = 0 RETURNING id",
        (Status.CREATED, namespace, id_, Status.RUNNING),
    )
    return bool(rows)


def save_exit(tx: Transaction, record: ContainerRecord) -> None:
    """Any status of life -> EXITED, and the event that tells of it."""
    assert record.exit is not None
    tx.execute(
        "UPDATE container SET status = ?, finished_ns = ?, exit = ?, pid = 0, announced = 1, retrying = 0"
        " WHERE namespace = ? AND id = ?",
        (
            Status.EXITED,
            record.finished_ns,
            record.exit.SerializeToString(),
            record.namespace,
            record.id,
        ),
    )
    tx.journal("container.died", record.id, exit_facts(record), namespace=record.namespace)


def exit_facts(record: ContainerRecord) -> dict[str, str | int | bool]:
    """What events say about how a container ended."""
    facts: dict[str, str | int | bool] = {"name": record.name, "image": record.config.image}
    if record.exit is not None:
        facts |= {"exit_code": record.exit.code, "oom_killed": record.exit.oom_killed}
        if record.exit.timed_out:
            facts["timed_out"] = True
        if record.exit.reason:
            facts["reason"] = record.exit.reason
    return facts


def begin_restart(tx: Transaction, record: ContainerRecord) -> ContainerRecord:
    """One more try by its policy, which counts however it goes, unless the engine does not live to see that."""
    return _save_restarts(tx, record._replace(restart_count=record.restarts_known + 1, retrying=True))


def end_restart(tx: Transaction, record: ContainerRecord) -> ContainerRecord:
    """The try came to nothing, and that was seen."""
    return _save_restarts(tx, record._replace(retrying=False))


def _save_restarts(tx: Transaction, record: ContainerRecord) -> ContainerRecord:
    tx.execute(
        "UPDATE container SET restart_count = ?, retrying = ? WHERE namespace = ? AND id = ?",
        (record.restart_count, int(record.retrying), record.namespace, record.id),
    )
    return record


def set_stopped_by_user(tx: Transaction, record: ContainerRecord) -> None:
    """Its restart policy leaves it alone until it is started."""
    tx.execute("UPDATE container SET stopped_by_user = 1 WHERE namespace = ? AND id = ?", (record.namespace, record.id))


def save_config(tx: Transaction, namespace: str, id_: str, config: ContainerConfig) -> None:
    """Labels, limits, restart policy or networks changed."""
    tx.execute(
        "UPDATE container SET config = ? WHERE namespace = ? AND id = ?",
        (config.SerializeToString(), namespace, id_),
    )


def save_endpoint(tx: Transaction, namespace: str, id_: str, endpoint: Endpoint) -> None:
    """Its place in networks changed."""
    tx.execute(
        "UPDATE container SET endpoint = ? WHERE namespace = ? AND id = ?",
        (endpoint.SerializeToString(), namespace, id_),
    )


def rename(tx: Transaction, namespace: str, id_: str, name: str) -> ContainerRecord:
    """Raises AlreadyExists, NotFound."""
    record = get(tx, namespace, id_)
    try:
        tx.execute("UPDATE container SET name = ? WHERE namespace = ? AND id = ?", (name, namespace, id_))
    except Duplicate as e:
        raise AlreadyExists(f"the name {name!r} is taken by another container", reason="NAME_TAKEN") from e
    tx.journal("container.renamed", id_, {"name": name, "old_name": record.name}, namespace=namespace)
    return get(tx, namespace, id_)


def delete_container(tx: Transaction, record: ContainerRecord) -> None:
    """Forget a container; its name is free again. No error if it is gone."""
    rows = tx.execute(
        "DELETE FROM container WHERE namespace = ? AND id = ? RETURNING id", (record.namespace, record.id)
    )
    # Nobody was told that a container came to be which was never created.
    if rows and record.status is not Status.CREATING:
        tx.journal("container.removed", record.id, exit_facts(record), namespace=record.namespace)


def check_move(record: ContainerRecord, to: Status) -> None:
    """Raises FailedPrecondition unless the move is legal."""
    if to not in ALLOWED[record.status]:
        raise FailedPrecondition(
            f"container {record.name} is {record.status.word}, it cannot become {to.word}",
            reason="BAD_STATUS",
            metadata={"container": record.id, "status": record.status.word},
        )


def get(view: Snapshot, namespace: str, id_: str) -> ContainerRecord:
    """The container with exactly this id. Raises NotFound."""
    record = find(view, namespace, id_)
    if record is None:
        raise _no_such(id_)
    return record


def find(view: Snapshot, namespace: str, id_: str) -> ContainerRecord | None:
    """The container with exactly this id, or None."""
    row = view.one(_SELECT + " WHERE namespace = ? AND id = ?", (namespace, id_))
    return None if row is None else _record(row)


def named(view: Snapshot, namespace: str, reference: str) -> ContainerRecord | None:
    """The container with exactly this id, else with this name, or None; one statement."""
    row = view.one(
        _SELECT + " WHERE namespace = :namespace AND (id = :meant OR name = :meant) ORDER BY id = :meant DESC",
        {"namespace": namespace, "meant": reference},
    )
    return None if row is None else _record(row)


def resolve(view: Snapshot, namespace: str, reference: str) -> ContainerRecord:
    """The container meant by an id, a name, or an unambiguous prefix of an id, in this order.

    Raises NotFound, FailedPrecondition when the prefix fits several.
    """
    found = named(view, namespace, reference)
    if found is not None:
        return found
    if not reference:
        raise NotFound("no container is named: give a name, an id, or the beginning of an id")
    # A range on the key instead of LIKE: no wildcards, and the index is used.
    rows = view.execute(
        _SELECT + " WHERE namespace = ? AND id >= ? AND id < ? LIMIT 6",
        (namespace, reference, reference + "\U0010ffff"),
    )
    if len(rows) > 1:
        some = ", ".join(f"{row['id'][:12]} ({row['name']})" for row in rows[:5])
        raise FailedPrecondition(
            f"{reference!r} is the beginning of several container ids: {some}{', …' if len(rows) > 5 else ''}"
            ": give more digits or a name",
            reason="AMBIGUOUS",
        )
    if not rows:
        raise _no_such(reference)
    return _record(rows[0])


def _no_such(reference: str) -> NotFound:
    return NotFound(f"no such container: {reference}", reason="NO_CONTAINER", metadata={"container": reference})


def containers(view: Snapshot, namespace: str) -> list[ContainerRecord]:
    """All of a namespace, newest first."""
    rows = view.execute(_SELECT + " WHERE namespace = ? ORDER BY created_ns DESC, id", (namespace,))
    return [_record(row) for row in rows]


def containers_in(view: Snapshot, statuses: Iterable[Status]) -> list[ContainerRecord]:
    """Those of all namespaces that are in one of these statuses."""
    wanted = tuple(statuses)
    marks = ", ".join("?" * len(wanted))
    rows = view.execute(f"{_SELECT} WHERE status IN ({marks})", wanted)
    return [_record(row) for row in rows]


def count_by_status(view: Snapshot, namespace: str) -> dict[Status, int]:
    """How many containers of a namespace are in each status."""
    rows = view.execute("SELECT status, count(*) FROM container WHERE namespace = ? GROUP BY status", (namespace,))
    return {Status(row[0]): int(row[1]) for row in rows}


def keys(view: Snapshot) -> list[tuple[str, str]]:
    """Namespace and id of every container."""
    return [(row[0], row[1]) for row in view.execute("SELECT namespace, id FROM container")]


def namespaces(view: Snapshot) -> list[str]:
    """Every namespace that ever held something."""
    return [str(row[0]) for row in view.execute("SELECT name FROM namespace ORDER BY name")]


def _record(row: Row) -> ContainerRecord:
    return ContainerRecord._make(row)._replace(
        status=Status(row["status"]),
        config=ContainerConfig.FromString(row["config"]),
        exit=None if row["exit"] is None else ExitStatus.FromString(row["exit"]),
        endpoint=None if row["endpoint"] is None else Endpoint.FromString(row["endpoint"]),
        stopped_by_user=bool(row["stopped_by_user"]),
        retrying=bool(row["retrying"]),
    )


# Merged journals


class Cursor(NamedTuple):
    """How far a leaf's journal has been merged; see the table."""

    seq: int = 0
    time_ns: int = 0
    known_until_ns: int = 0


def cursor(view: Snapshot, origin: str) -> Cursor:
    """Of one leaf."""
    row = view.one("SELECT seq, time_ns, known_until_ns FROM merged WHERE origin = ?", (origin,))
    return Cursor() if row is None else Cursor(*row)


def cursors(view: Snapshot) -> dict[str, Cursor]:
    """Of every leaf that anything was merged from."""
    rows = view.execute("SELECT origin, seq, time_ns, known_until_ns FROM merged")
    return {origin: Cursor(seq, time_ns, known_until_ns) for origin, seq, time_ns, known_until_ns in rows}


def save_cursors(tx: Transaction, cursors: Mapping[str, Cursor]) -> None:
    """Belongs in the transaction that journals what was merged: exactly once, whatever crashes."""
    values = [x for origin, at in cursors.items() for x in (origin, at.seq, at.time_ns, at.known_until_ns)]
    rows = ", ".join(["(?, ?, ?, ?)"] * len(cursors))
    tx.execute(  # OR REPLACE would write the key's index, too
        f"INSERT INTO merged VALUES {rows} ON CONFLICT (origin) DO UPDATE"  # noqa: S608 (constants)
        " SET seq = excluded.seq, time_ns = excluded.time_ns, known_until_ns = excluded.known_until_ns",
        values,
    )
