"""What is in reach of what must stay: the two queries that collection deletes by, and that disk usage is reckoned with.

The graph they walk is drawn in corral.images.collector. Parameters of both: `going`, a JSON list of the numbers of
image rows that count for nothing; `pinned`, a JSON list of digests and chain ids that count though no row names them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from corral.images.trees import Kind
from corral.store import Row, Snapshot, Transaction

# At `now`: blobs whose time of grace is not over are as good as reached.
_BLOBS_BEYOND = """
WITH RECURSIVE staying AS (
    SELECT * FROM images WHERE row NOT IN (SELECT value FROM json_each(:going))
), reached(digest) AS (
    SELECT target_digest FROM staying
    UNION SELECT manifest_digest FROM staying
    UNION SELECT key FROM lease_resources WHERE kind = 'blob'
    UNION SELECT value FROM json_each(:pinned)
    UNION SELECT child FROM blob_edges JOIN reached ON parent = digest
)
{what} FROM blobs WHERE keep_until_ns <= :now AND digest NOT IN (SELECT digest FROM reached)
"""
_LAYERS_BEYOND = """
WITH RECURSIVE staying AS (
    SELECT * FROM images WHERE row NOT IN (SELECT value FROM json_each(:going))
), content(digest) AS (
    SELECT target_digest FROM staying
    UNION SELECT manifest_digest FROM staying
    UNION SELECT key FROM lease_resources WHERE kind = 'blob'
    UNION SELECT value FROM json_each(:pinned)
    UNION SELECT child FROM blob_edges JOIN content ON parent = digest
), reached(id) AS (
    SELECT id FROM snapshots WHERE kind != :committed OR namespace != ''
    UNION SELECT tree FROM recipes JOIN blobs USING (digest)
        WHERE keep_until_ns > :now OR digest IN (SELECT digest FROM content)
    UNION SELECT id FROM snapshots WHERE driver = :driver AND key IN (SELECT chain_id FROM staying)
    UNION SELECT id FROM snapshots WHERE key IN (SELECT key FROM lease_resources WHERE kind = 'layer')
    UNION SELECT id FROM snapshots WHERE key IN (SELECT value FROM json_each(:pinned))
    UNION SELECT parent FROM snapshots JOIN reached USING (id) WHERE parent IS NOT NULL
)
{what} FROM snapshots WHERE kind = :committed AND namespace = '' AND id NOT IN (SELECT id FROM reached)
"""
_STORED = "coalesce(stored_bytes, size_bytes)"
_SUM_OF_BLOBS = f"SELECT count(*) AS count, coalesce(sum({_STORED}), 0) AS size_bytes"
_SUM_OF_LAYERS = "SELECT count(*) AS count, coalesce(sum(size_bytes), 0) AS size_bytes"
_DELETE_BLOBS = _BLOBS_BEYOND.format(what="DELETE") + f"RETURNING digest, {_STORED} AS size_bytes"
_DELETE_LAYERS = _LAYERS_BEYOND.format(what="DELETE") + "RETURNING id, key, size_bytes"
_SUM_BLOBS = _BLOBS_BEYOND.format(what=_SUM_OF_BLOBS)
_SUM_LAYERS = _LAYERS_BEYOND.format(what=_SUM_OF_LAYERS)


@dataclass(frozen=True, slots=True)
class Total:
    """How many there are, and how much they take."""

    count: int
    size_bytes: int


def delete_blobs(transaction: Transaction, *, now_ns: int, pinned: Iterable[str]) -> list[Row]:
    """Delete the rows of blobs out of reach; digest and size_bytes of each."""
    return transaction.execute(_DELETE_BLOBS, {"now": now_ns, "pinned": json.dumps(list(pinned)), "going": "[]"})


def delete_layers(transaction: Transaction, *, now_ns: int, driver: str, pinned: Iterable[str]) -> list[Row]:
    """Delete the rows of shared layers out of reach; id, key and size_bytes of each."""
    return transaction.execute(_DELETE_LAYERS, _of_layers(now_ns, driver, pinned, ()))


def blobs_beyond(snapshot: Snapshot, *, now_ns: int, pinned: Iterable[str], going: Iterable[int] = ()) -> Total:
    """The blobs that delete_blobs() would take, were the images `going` not there."""
    parameters: dict[str, int | str] = {
        "now": now_ns,
        "pinned": json.dumps(list(pinned)),
        "going": json.dumps(list(going)),
    }
    return _total(snapshot.execute(_SUM_BLOBS, parameters))


def layers_beyond(
    snapshot: Snapshot, *, now_ns: int, driver: str, pinned: Iterable[str], going: Iterable[int] = ()
) -> Total:
    """The layers that delete_layers() would take, were the images `going` not there."""
    return _total(snapshot.execute(_SUM_LAYERS, _of_layers(now_ns, driver, pinned, going)))


def _of_layers(now_ns: int, driver: str, pinned: Iterable[str], going: Iterable[int]) -> dict[str, str | int]:
    return {
        "now": now_ns,
        "committed": Kind.COMMITTED,
        "driver": driver,
        "pinned": json.dumps(list(pinned)),
        "going": json.dumps(list(going)),
    }


def _total(rows: list[Row]) -> Total:
    [row] = rows
    return Total(row["count"], row["size_bytes"])
