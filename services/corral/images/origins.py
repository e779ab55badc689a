"""In which repositories a namespace has seen a blob: a registry that has it under another name need not be sent it."""

import time
from collections.abc import Iterable

from corral.images.digest import Digest
from corral.images.reference import Reference
from corral.store import Snapshot, Transaction


def record(transaction: Transaction, namespace: str, digests: Iterable[Digest], reference: Reference) -> None:
    """Those of the blobs that are here."""
    now = time.time_ns()
    for digest in digests:
        transaction.execute(
            "INSERT INTO blob_origins (namespace, digest, domain, path, seen_ns)"
            " SELECT ?, digest, ?, ?, ? FROM blobs WHERE digest = ?"
            " ON CONFLICT DO UPDATE SET seen_ns = excluded.seen_ns",
            (namespace, reference.domain, reference.path, now, digest),
        )


def elsewhere(snapshot: Snapshot, namespace: str, digest: Digest, reference: Reference) -> str:
    """Another repository of the same registry that has the blob, the one seen last; empty if none is known."""
    row = snapshot.one(
        "SELECT path FROM blob_origins WHERE namespace = ? AND digest = ? AND domain = ? AND path != ?"
        " ORDER BY seen_ns DESC LIMIT 1",
        (namespace, digest, reference.domain, reference.path),
    )
    return "" if row is None else str(row[0])
