"""Which namespaces have a blob: those that have brought its bytes themselves, from a registry, an archive or a client.

A blob is on disk once, for all. That it is there does not say who may see it: whoever writes a manifest can name any
digest. So a namespace that has not brought a blob fetches it, by its own right to its own registry, as if it were not
there; only then is the one on disk its own too.
"""

from collections.abc import Iterable

from corral.images.digest import Digest
from corral.store import Snapshot, Transaction


def record(transaction: Transaction, namespace: str, digests: Iterable[Digest]) -> None:
    """Of blobs that are here. A row goes with its blob."""
    for digest in digests:
        transaction.execute("INSERT OR IGNORE INTO blob_holders (namespace, digest) VALUES (?, ?)", (namespace, digest))


def has(snapshot: Snapshot, namespace: str, digest: Digest) -> bool:
    row = snapshot.one("SELECT 1 FROM blob_holders WHERE namespace = ? AND digest = ?", (namespace, digest))
    return row is not None
