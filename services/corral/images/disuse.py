"""Images that nobody uses: those that may go when somebody asks for room, or the disk does."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from corral.images import catalog
from corral.images.catalog import ImageRecord
from corral.images.trees import Kind
from corral.store import Snapshot

# No tree was made from it, under whatever name, and no lease is on any of its names.
_UNUSED = """
SELECT namespace, image_id, max(used_ns) AS used_ns, json_group_array(row) AS rows FROM images AS image
WHERE (:namespace IS NULL OR namespace = :namespace) AND NOT EXISTS (
    SELECT 1 FROM snapshots AS tree WHERE tree.namespace = image.namespace AND tree.image_id = image.image_id
      AND tree.image_id != '' AND tree.kind != :committed
)
GROUP BY namespace, image_id
HAVING (:dangling = 0 OR max(name) = '') AND NOT max(EXISTS (
    SELECT 1 FROM lease_resources AS held
    WHERE (held.kind = 'blob' AND held.key IN (image.target_digest, image.manifest_digest, image.image_id))
       OR (held.kind = 'layer' AND held.key = image.chain_id)
))
ORDER BY max(used_ns), namespace, image_id
"""

type IsPinned = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Unused:
    """All names of one image in one namespace."""

    used_ns: int
    records: tuple[ImageRecord, ...]
    rows: tuple[int, ...]
    """Their numbers in the table."""


def unused(snapshot: Snapshot, namespace: str | None, is_pinned: IsPinned, *, dangling: bool = False) -> list[Unused]:
    """Those of a namespace, or of all, that no tree, lease or pin is on; the longest unused first.

    dangling: only those that have no name.
    """
    rows = snapshot.execute(_UNUSED, {"namespace": namespace, "dangling": int(dangling), "committed": Kind.COMMITTED})
    found = [
        Unused(
            row["used_ns"],
            tuple(catalog.by_id(snapshot, row["namespace"], row["image_id"])),
            tuple(json.loads(row["rows"])),
        )
        for row in rows
    ]
    return [image for image in found if not _is_pinned(image, is_pinned)]


def _is_pinned(image: Unused, is_pinned: IsPinned) -> bool:
    return any(
        is_pinned(name)
        for record in image.records
        for name in (record.target.digest, record.manifest.digest, record.image_id, record.chain_id)
    )
