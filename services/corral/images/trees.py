"""The rows of snapshots: layers under their chain ids, active trees and views under their users' keys."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from corral.images.snapshotter import TreeId
from corral.images.store import SHARED
from corral.store import Row, Snapshot, Transaction


class Kind(IntEnum):
    """Numbers as in the database and on the wire."""

    ACTIVE = 1
    VIEW = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class TreeRecord:
    """One snapshot."""

    id: TreeId
    namespace: str
    key: str
    kind: Kind
    parent: TreeId | None
    chain: tuple[TreeId, ...]
    driver: str
    image_id: str
    image_name: str
    created_ns: int
    size_bytes: int
    inodes: int
    quota_bytes: int
    labels: Mapping[str, str]

    @property
    def chain_with_self(self) -> tuple[TreeId, ...]:
        return (self.id, *self.chain)


def _record(row: Row) -> TreeRecord:
    return TreeRecord(
        id=TreeId(row["id"]),
        namespace=row["namespace"],
        key=row["key"],
        kind=Kind(row["kind"]),
        parent=None if row["parent"] is None else TreeId(row["parent"]),
        chain=tuple(TreeId(int(i)) for i in row["chain"].split(",") if i),
        driver=row["driver"],
        image_id=row["image_id"],
        image_name=row["image_name"],
        created_ns=row["created_ns"],
        size_bytes=row["size_bytes"],
        inodes=row["inodes"],
        quota_bytes=row["quota_bytes"],
        labels=json.loads(row["labels"]) if row["labels"] != "{}" else {},
    )


def new_record(
    tree: TreeId,
    *,
    namespace: str,
    key: str,
    kind: Kind,
    parent: TreeRecord | None,
    driver: str,
    image_id: str = "",
    image_name: str = "",
    size_bytes: int = 0,
    inodes: int = 0,
    quota_bytes: int = 0,
    labels: Mapping[str, str] | None = None,
) -> TreeRecord:
    return TreeRecord(
        id=tree,
        namespace=namespace,
        key=key,
        kind=kind,
        parent=parent.id if parent else None,
        chain=parent.chain_with_self if parent else (),
        driver=driver,
        image_id=image_id,
        image_name=image_name,
        created_ns=time.time_ns(),
        size_bytes=size_bytes,
        inodes=inodes,
        quota_bytes=quota_bytes,
        labels=labels or {},
    )


def insert(transaction: Transaction, record: TreeRecord) -> None:
    """Raises Duplicate if the key is taken, Referenced if the parent is gone."""
    transaction.execute(
        "INSERT INTO snapshots (id, namespace, key, kind, parent, chain, driver, image_id, image_name, created_ns,"
        " size_bytes, inodes, quota_bytes, labels) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.id, record.namespace, record.key, record.kind, record.parent, ",".join(map(str, record.chain)),
            record.driver, record.image_id, record.image_name, record.created_ns,
            record.size_bytes, record.inodes, record.quota_bytes, json.dumps(dict(record.labels)),
        ),
    )  # fmt: skip


def layer(snapshot: Snapshot, chain_id: str, driver: str) -> TreeRecord | None:
    """The shared layer that ends a chain."""
    row = snapshot.one(
        "SELECT * FROM snapshots WHERE namespace = ? AND key = ? AND driver = ?", (SHARED, chain_id, driver)
    )
    return None if row is None else _record(row)


def layers(snapshot: Snapshot, chain: Sequence[str], driver: str) -> dict[str, TreeRecord]:
    """Those of the chain ids that are here."""
    found = {chain_id: layer(snapshot, chain_id, driver) for chain_id in chain}
    return {chain_id: record for chain_id, record in found.items() if record is not None}


def own(snapshot: Snapshot, namespace: str, key: str) -> TreeRecord | None:
    """The namespace's own snapshot called `key`."""
    row = snapshot.one("SELECT * FROM snapshots WHERE namespace = ? AND key = ?", (namespace, key))
    return None if row is None else _record(row)


def everything(snapshot: Snapshot, namespace: str, kind: Kind | None) -> list[TreeRecord]:
    """The namespace's own, and the layers all share; by age."""
    rows = snapshot.execute(
        "SELECT * FROM snapshots WHERE namespace IN (:own, :shared) AND (:kind IS NULL OR kind = :kind)"
        " ORDER BY created_ns, id",
        {"own": namespace, "shared": SHARED, "kind": kind},
    )
    return [_record(row) for row in rows]


def of_all(snapshot: Snapshot) -> list[TreeRecord]:
    """Of all namespaces and drivers."""
    return [_record(row) for row in snapshot.execute("SELECT * FROM snapshots ORDER BY id")]


def key_of(snapshot: Snapshot, tree: TreeId | None) -> str:
    row = None if tree is None else snapshot.one("SELECT key FROM snapshots WHERE id = ?", (tree,))
    return "" if row is None else str(row[0])


def users_of_image(snapshot: Snapshot, namespace: str, image_id: str, name: str | None = None) -> list[str]:
    """Keys of the active snapshots and views that were made from an image, under a certain name or under any."""
    rows = snapshot.execute(
        "SELECT key FROM snapshots WHERE namespace = :namespace AND image_id = :image"
        " AND (:name IS NULL OR image_name = :name) AND kind != :committed ORDER BY key",
        {"namespace": namespace, "image": image_id, "name": name, "committed": Kind.COMMITTED},
    )
    return [row[0] for row in rows]


def size_of(snapshot: Snapshot, chain: Sequence[TreeId]) -> int:
    """Bytes of all these layers."""
    row = snapshot.one(
        "SELECT coalesce(sum(size_bytes), 0) FROM snapshots WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(chain),),
    )
    return 0 if row is None else int(row[0])


def children_of(snapshot: Snapshot, tree: TreeId) -> list[str]:
    return [row[0] for row in snapshot.execute("SELECT key FROM snapshots WHERE parent = ? ORDER BY key", (tree,))]


def delete(transaction: Transaction, tree: TreeId) -> None:
    """Raises Referenced while something lies on it."""
    transaction.execute("DELETE FROM snapshots WHERE id = ?", (tree,))


def commit(transaction: Transaction, record: TreeRecord, name: str, size_bytes: int, inodes: int) -> None:
    """Raises Duplicate."""
    transaction.execute(
        "UPDATE snapshots SET key = ?, kind = ?, image_id = '', image_name = '', size_bytes = ?, inodes = ?"
        " WHERE id = ?",
        (name, Kind.COMMITTED, size_bytes, inodes, record.id),
    )


def ids(snapshot: Snapshot, driver: str) -> dict[int, Kind]:
    return {
        row["id"]: Kind(row["kind"])
        for row in snapshot.execute("SELECT id, kind FROM snapshots WHERE driver = ?", (driver,))
    }


def highest_id(snapshot: Snapshot) -> int:
    row = snapshot.one("SELECT coalesce(max(id), 0) FROM snapshots")
    return 0 if row is None else int(row[0])
