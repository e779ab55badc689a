"""Leases: what nothing else refers to yet, kept for somebody who is still at work.

What is made under a lease belongs to it: when the lease ends, by delete or because its time is over, what it alone kept
is collected. Prepare of an active snapshot again, without the lease, takes it out of the lease's hands: it is then its
maker's, until he removes it.
"""

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from corral.images import catalog
from corral.images.snapshotter import TreeId
from corral.rpc.context import check_id
from corral.rpc.errors import AlreadyExists, InvalidArgument, NotFound
from corral.store import Duplicate, Referenced, Row, Snapshot, Transaction

DEFAULT_TTL_NS = 3600 * 10**9
MAX_TTL_NS = 7 * 24 * 3600 * 10**9

type Held = Literal["blob", "layer", "snapshot"]


@dataclass(frozen=True, slots=True)
class Lease:
    namespace: str
    id: str
    created_ns: int
    expires_ns: int
    labels: Mapping[str, str]
    resources: tuple[str, ...] = ()


def ttl_or_default(ttl_ns: int) -> int:
    """Raises InvalidArgument."""
    if ttl_ns < 0 or ttl_ns > MAX_TTL_NS:
        raise InvalidArgument("a lease lasts at most a week; renew it for longer", reason="BAD_TTL")
    return ttl_ns or DEFAULT_TTL_NS


def create(transaction: Transaction, namespace: str, lease_id: str, ttl_ns: int, labels: Mapping[str, str]) -> Lease:
    """Raises AlreadyExists, InvalidArgument."""
    lease_id = check_id(lease_id, "lease id") if lease_id else secrets.token_hex(8)
    now = time.time_ns()
    lease = Lease(namespace, lease_id, now, now + ttl_or_default(ttl_ns), labels)
    try:
        transaction.execute(
            "INSERT INTO leases (namespace, id, created_ns, expires_ns, labels) VALUES (?, ?, ?, ?, ?)",
            (namespace, lease_id, lease.created_ns, lease.expires_ns, json.dumps(dict(labels))),
        )
    except Duplicate as e:
        raise AlreadyExists(f"lease {lease_id!r} already exists: renew it, or choose another id") from e
    return lease


def renew(transaction: Transaction, namespace: str, lease_id: str, ttl_ns: int) -> Lease:
    """Raises NotFound."""
    expires = time.time_ns() + ttl_or_default(ttl_ns)
    check_alive(transaction, namespace, lease_id)
    transaction.execute(
        "UPDATE leases SET expires_ns = ? WHERE namespace = ? AND id = ?", (expires, namespace, lease_id)
    )
    return get(transaction, namespace, lease_id)


def get(snapshot: Snapshot, namespace: str, lease_id: str) -> Lease:
    """Raises NotFound."""
    row = snapshot.one("SELECT * FROM leases WHERE namespace = ? AND id = ?", (namespace, lease_id))
    if row is None:
        raise _unknown(lease_id)
    return _lease(snapshot, row)


def check_alive(snapshot: Snapshot, namespace: str, lease_id: str) -> None:
    """Raises NotFound."""
    row = snapshot.one("SELECT expires_ns FROM leases WHERE namespace = ? AND id = ?", (namespace, lease_id))
    if row is None or row[0] <= time.time_ns():
        raise _unknown(lease_id)


def everything(snapshot: Snapshot, namespace: str) -> list[Lease]:
    rows = snapshot.execute("SELECT * FROM leases WHERE namespace = ? ORDER BY created_ns, id", (namespace,))
    return [_lease(snapshot, row) for row in rows]


def end(transaction: Transaction, namespace: str, lease_id: str) -> list[TreeId]:
    """Delete the lease, with the snapshots it alone kept; their trees are to be removed. No such lease is no error."""
    rows = transaction.execute(
        "SELECT s.id, s.key, s.image_id FROM lease_resources r"
        " JOIN snapshots s ON s.namespace = r.namespace AND s.key = r.key"
        " WHERE r.namespace = :namespace AND r.lease = :lease AND r.kind = 'snapshot' AND NOT EXISTS"
        " (SELECT 1 FROM lease_resources o WHERE o.kind = 'snapshot' AND o.namespace = :namespace AND o.key = r.key"
        " AND o.lease != :lease) ORDER BY s.id DESC",
        {"namespace": namespace, "lease": lease_id},
    )
    transaction.execute("DELETE FROM leases WHERE namespace = ? AND id = ?", (namespace, lease_id))
    ended = []
    for row in rows:
        with suppress(Referenced):  # a committed one that others lie on: it is theirs now
            transaction.execute("DELETE FROM snapshots WHERE id = ?", (row["id"],))
            transaction.journal("snapshot.removed", row["key"], {"lease": lease_id}, namespace=namespace)
            if row["image_id"]:
                catalog.note_use(transaction, namespace, row["image_id"])
            ended.append(TreeId(row["id"]))
    return ended


def end_expired(transaction: Transaction) -> list[TreeId]:
    """End every lease whose time is over; returns the trees to remove."""
    rows = transaction.execute("SELECT namespace, id FROM leases WHERE expires_ns <= ?", (time.time_ns(),))
    trees: list[TreeId] = []
    for row in rows:
        trees += end(transaction, row["namespace"], row["id"])
    return trees


def hold(transaction: Transaction, namespace: str, lease_id: str, kind: Held, key: str) -> None:
    """Put something under the lease. An empty lease id holds nothing. Raises NotFound if the lease has ended."""
    if not lease_id:
        return
    check_alive(transaction, namespace, lease_id)
    transaction.execute(
        "INSERT OR IGNORE INTO lease_resources (namespace, lease, kind, key) VALUES (?, ?, ?, ?)",
        (namespace, lease_id, kind, key),
    )


def release(transaction: Transaction, namespace: str, kind: Held, key: str) -> None:
    """Take something out of every lease of the namespace."""
    transaction.execute(
        "DELETE FROM lease_resources WHERE namespace = ? AND kind = ? AND key = ?", (namespace, kind, key)
    )


def next_expiry_ns(snapshot: Snapshot) -> int | None:
    row = snapshot.one("SELECT min(expires_ns) FROM leases")
    return None if row is None or row[0] is None else int(row[0])


def _lease(snapshot: Snapshot, row: Row) -> Lease:
    rows = snapshot.execute(
        "SELECT key FROM lease_resources WHERE namespace = ? AND lease = ? ORDER BY key", (row["namespace"], row["id"])
    )
    return Lease(
        row["namespace"],
        row["id"],
        row["created_ns"],
        row["expires_ns"],
        json.loads(row["labels"]),
        tuple(r[0] for r in rows),
    )


def _unknown(lease_id: str) -> NotFound:
    return NotFound(f"lease {lease_id!r} does not exist or has expired: create one and begin again", reason="NO_LEASE")
