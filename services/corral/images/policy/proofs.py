"""The rows of what was proven: a key has signed that a manifest or index is of a repository.

They are facts, not permissions: whether a key is trusted is for the settings to say. A row goes with its blob.
"""

import json
import time
from collections.abc import Collection
from dataclasses import dataclass

from corral.images.digest import Digest
from corral.store import Snapshot, Transaction


@dataclass(frozen=True, slots=True)
class Proof:
    """tag: the only one that the signature is for; empty if it is for any."""

    digest: Digest
    repository: str
    tag: str
    key_id: str


def record(transaction: Transaction, proof: Proof) -> None:
    """Of a blob that is here."""
    transaction.execute(
        "INSERT INTO proofs (digest, repository, tag, key_id, proven_ns) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET proven_ns = excluded.proven_ns",
        (proof.digest, proof.repository, proof.tag, proof.key_id, time.time_ns()),
    )


def is_proven(
    snapshot: Snapshot, digests: Collection[Digest], repository: str, tag: str, key_ids: Collection[str]
) -> bool:
    """Whether one of the keys has signed one of the digests for the repository. tag "": it is named by its digest."""
    row = snapshot.one(
        "SELECT 1 FROM proofs WHERE repository = :repository AND (:tag = '' OR tag IN ('', :tag))"
        " AND digest IN (SELECT value FROM json_each(:digests)) AND key_id IN (SELECT value FROM json_each(:keys))",
        {
            "repository": repository,
            "tag": tag,
            "digests": json.dumps(list(digests)),
            "keys": json.dumps(list(key_ids)),
        },
    )
    return row is not None
