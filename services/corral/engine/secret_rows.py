"""Rows of secrets, and of who uses them. Their content is in no row."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from corral.rpc.errors import NotFound
from corral.store import Row, Snapshot, Transaction

SCHEMA = """
CREATE TABLE secret (
    namespace TEXT NOT NULL REFERENCES namespace(name),
    name TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE,        -- the name of its file
    labels TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    created_ns INTEGER NOT NULL,
    PRIMARY KEY (namespace, name)
) STRICT;
CREATE TABLE secret_use (
    namespace TEXT NOT NULL,
    secret TEXT NOT NULL,
    container TEXT NOT NULL,
    PRIMARY KEY (namespace, secret, container),
    FOREIGN KEY (namespace, secret) REFERENCES secret (namespace, name) ON DELETE RESTRICT,
    FOREIGN KEY (namespace, container) REFERENCES container (namespace, id) ON DELETE CASCADE
) STRICT;
CREATE INDEX secret_use_container ON secret_use (namespace, container);
"""


@dataclass(frozen=True, slots=True)
class SecretRecord:
    """One row, with the ids of the containers that use it."""

    namespace: str
    name: str
    id: str
    created_ns: int
    labels: Mapping[str, str]
    size_bytes: int
    containers: tuple[str, ...] = ()


def insert_secret(tx: Transaction, secret: SecretRecord) -> None:
    """Raises Duplicate if the name is taken."""
    tx.execute("INSERT OR IGNORE INTO namespace VALUES (?)", (secret.namespace,))
    tx.execute(
        "INSERT INTO secret (namespace, name, id, labels, size_bytes, created_ns) VALUES (?, ?, ?, ?, ?, ?)",
        (
            secret.namespace,
            secret.name,
            secret.id,
            json.dumps(dict(secret.labels)),
            secret.size_bytes,
            secret.created_ns,
        ),
    )
    tx.journal("secret.created", secret.name, namespace=secret.namespace)


def delete_secret(tx: Transaction, namespace: str, name: str) -> str:
    """Its id. Raises Referenced while a container uses it, NotFound."""
    rows = tx.execute("DELETE FROM secret WHERE namespace = ? AND name = ? RETURNING id", (namespace, name))
    if not rows:
        raise no_secret(name)
    tx.journal("secret.removed", name, namespace=namespace)
    return str(rows[0]["id"])


def use_secrets(tx: Transaction, namespace: str, container: str, names: Iterable[str]) -> None:
    """Note that a container uses these. Raises NotFound."""
    for name in names:
        get_secret(tx, namespace, name)
        tx.execute("INSERT OR IGNORE INTO secret_use VALUES (?, ?, ?)", (namespace, name, container))


def secrets(view: Snapshot, namespace: str | None) -> list[SecretRecord]:
    """All secrets of a namespace, or of all, by name."""
    rows = view.execute(
        f"{_SELECT} WHERE :namespace IS NULL OR s.namespace = :namespace {_GROUPED}", {"namespace": namespace}
    )
    return [_secret(row) for row in rows]


def get_secret(view: Snapshot, namespace: str, name: str) -> SecretRecord:
    """Raises NotFound."""
    row = view.one(f"{_SELECT} WHERE s.namespace = ? AND s.name = ? {_GROUPED}", (namespace, name))
    if row is None:
        raise no_secret(name)
    return _secret(row)


_SELECT = (
    "SELECT s.*, group_concat(u.container) AS containers FROM secret s LEFT JOIN secret_use u"
    " ON u.namespace = s.namespace AND u.secret = s.name"
)
_GROUPED = "GROUP BY s.namespace, s.name ORDER BY s.namespace, s.name"


def no_secret(name: str) -> NotFound:
    """The error for one that is not there."""
    return NotFound(f"no such secret: {name}; 'corral secret create' makes one", reason="NO_SECRET")


def _secret(row: Row) -> SecretRecord:
    return SecretRecord(
        namespace=row["namespace"],
        name=row["name"],
        id=row["id"],
        created_ns=row["created_ns"],
        labels=json.loads(row["labels"]),
        size_bytes=row["size_bytes"],
        containers=tuple(sorted((row["containers"] or "").split(","))) if row["containers"] else (),
    )
