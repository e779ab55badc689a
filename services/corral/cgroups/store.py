"""The rows of the cgroups leaf. Every function works inside the snapshot or transaction it is given.

    making --> ready --> (row deleted)

A row that is `making` is an intent: its cgroup may be there or not, and nobody has been told of it.
"""

import enum
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from corral.kernel.cgroup import PressureTrigger
from corral.store import JSON, Row, Snapshot, Transaction

MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE cgroups (
        namespace TEXT NOT NULL,
        id TEXT NOT NULL,
        path TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        first_resources BLOB NOT NULL,    -- corral.types.v1.Resources, as it was made with
        resources BLOB NOT NULL,          -- likewise, with all updates
        labels TEXT NOT NULL,
        created_ns INTEGER NOT NULL,
        oom_kills INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (namespace, id)
    ) STRICT, WITHOUT ROWID;
    """,
)


class State(enum.StrEnum):
    """Of a row."""

    MAKING = "making"
    READY = "ready"


class Key(NamedTuple):
    """What names a cgroup."""

    namespace: str
    id: str


class Record(NamedTuple):
    """One row."""

    key: Key
    path: str
    state: State
    first_resources: bytes
    resources: bytes
    labels: Mapping[str, str]
    created_ns: int
    oom_kills: int = 0


def insert(transaction: Transaction, record: Record) -> None:
    """A new row. Raises Duplicate if the id or the path is taken."""
    transaction.execute(
        "INSERT INTO cgroups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.key.namespace,
            record.key.id,
            record.path,
            record.state,
            record.first_resources,
            record.resources,
            json.dumps(record.labels) if record.labels else "{}",
            record.created_ns,
            record.oom_kills,
        ),
    )


def put_ready(transaction: Transaction, record: Record, *, over_intent: bool) -> None:
    """The row of a cgroup that now exists, over its intent, and the event."""
    if over_intent:
        transaction.execute(
            "DELETE FROM cgroups WHERE namespace = ? AND id = ? AND state = ?", (*_id(record.key), State.MAKING)
        )
    insert(transaction, record)
    journal(transaction, "cgroup.created", record.key, {"path": record.path})


def set_resources(transaction: Transaction, key: Key, resources: bytes) -> None:
    """What an update left, and the event."""
    transaction.execute("UPDATE cgroups SET resources = ? WHERE namespace = ? AND id = ?", (resources, *_id(key)))
    journal(transaction, "cgroup.updated", key)


def set_oom_kills(transaction: Transaction, key: Key, kills: int) -> None:
    """A new count of OOM kills and the event, unless the row knows as many."""
    rows = transaction.execute(
        "UPDATE cgroups SET oom_kills = ? WHERE namespace = ? AND id = ? AND oom_kills < ? RETURNING id",
        (kills, *_id(key), kills),
    )
    if rows:
        journal(transaction, "cgroup.oom", key, {"oom_kills": kills})


def pressed(transaction: Transaction, key: Key, trigger: PressureTrigger) -> None:
    """The event that a trigger was reached, if there is a row."""
    if find(transaction, key) is not None:
        facts: dict[str, JSON] = {name: getattr(trigger, name) for name in PressureTrigger.__slots__}
        journal(transaction, "cgroup.pressure", key, facts)


def delete(transaction: Transaction, record: Record, payload: Mapping[str, JSON]) -> None:
    """Remove a row that is there; an event only if anybody was told of its cgroup."""
    # RETURNING would cost as much as the rest.
    transaction.execute("DELETE FROM cgroups WHERE namespace = ? AND id = ?", _id(record.key))
    if record.state is State.READY:
        journal(transaction, "cgroup.removed", record.key, payload)


def journal(transaction: Transaction, topic: str, key: Key, payload: Mapping[str, JSON] | None = None) -> None:
    """One event about a cgroup."""
    transaction.journal(topic, key.id, payload, namespace=key.namespace)


def find(snapshot: Snapshot, key: Key) -> Record | None:
    """One row."""
    row = snapshot.one("SELECT * FROM cgroups WHERE namespace = ? AND id = ?", _id(key))
    return None if row is None else _record(row)


def every(snapshot: Snapshot, *, namespace: str | None = None) -> list[Record]:
    """All rows, or those of a namespace, oldest first."""
    rows = snapshot.execute(
        "SELECT * FROM cgroups WHERE :namespace IS NULL OR namespace = :namespace ORDER BY created_ns, namespace, id",
        {"namespace": namespace},
    )
    return [_record(row) for row in rows]


def _id(key: Key) -> tuple[str, str]:
    return key.namespace, key.id


def _record(row: Row) -> Record:
    return Record(
        key=Key(row["namespace"], row["id"]),
        path=row["path"],
        state=State(row["state"]),
        first_resources=row["first_resources"],
        resources=row["resources"],
        labels=json.loads(row["labels"]),
        created_ns=row["created_ns"],
        oom_kills=row["oom_kills"],
    )
