"""What is on disk, and how much of it could go."""

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from corral.images import disuse, reach, trees
from corral.images.collector import MAX_NS, Collector
from corral.images.details import DetailsCache
from corral.images.digest import Digest
from corral.images.drivers import Drivers
from corral.images.model import Descriptor
from corral.images.partials import Partials
from corral.images.store import SHARED
from corral.images.trees import Kind, TreeRecord
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError
from corral.store import Database, Snapshot

# Trees are walked by so many threads at a time.
PARALLEL = 4


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """Of one image id."""

    image_id: str
    names: tuple[str, ...]
    manifest: Descriptor
    used_ns: int
    size_bytes: int
    shared_bytes: int
    snapshots: tuple[str, ...]
    created_ns: int = 0
    """As the image says; 0 if it does not."""


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Of all namespaces."""

    total: int
    active: int
    size_bytes: int
    reclaimable_bytes: int


@dataclass(frozen=True, slots=True)
class TreeUsage:
    record: TreeRecord
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """See corral.images.v1.DiskUsageResponse."""

    images: Sequence[ImageUsage]
    images_size_bytes: int
    images_reclaimable_bytes: int
    blobs: StoreUsage
    layers: StoreUsage
    partials: StoreUsage
    snapshots: Sequence[TreeUsage]


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the database tells, all at one moment."""

    images: Sequence[ImageUsage]
    size_bytes: int
    reclaimable_bytes: int
    blobs: StoreUsage
    layers: StoreUsage
    trees: Sequence[TreeRecord]


type Sizes = Mapping[str, int]


class Accounts:
    """See the module. Nothing of it runs on the event loop but the putting together."""

    def __init__(
        self, database: Database, drivers: Drivers, collector: Collector, partials: Partials, details: DetailsCache
    ) -> None:
        self._database = database
        self._drivers = drivers
        self._collector = collector
        self._partials = partials
        self._details = details

    async def usage(self, namespace: str) -> DiskUsage:
        """Bytes of rows are as they were when each was stored; what is written to is measured now."""
        pinned = self._collector.pins()
        rows = await self._database.read(lambda s: self._rows(s, namespace, pinned))
        limit = asyncio.Semaphore(PARALLEL)

        async def measured(record: TreeRecord) -> TreeUsage:
            async with limit:
                return TreeUsage(record, await run_blocking(self._measure, record))

        partials, measured_trees = await asyncio.gather(
            run_blocking(self._partials_usage), asyncio.gather(*(measured(record) for record in rows.trees))
        )
        return DiskUsage(
            rows.images,
            rows.size_bytes,
            rows.reclaimable_bytes,
            rows.blobs,
            rows.layers,
            partials,
            measured_trees,
        )

    def _measure(self, record: TreeRecord) -> int:
        if record.kind is Kind.COMMITTED:
            return record.size_bytes
        try:
            return self._drivers.of(record.driver).usage(record.id).size_bytes
        except (OSError, CorralError):  # it went meanwhile, or its driver cannot be asked here any more
            return 0

    def _partials_usage(self) -> StoreUsage:
        found = self._partials.found()
        size = sum(part.size_bytes for part in found)
        idle = sum(part.size_bytes for part in found if not part.is_open)
        return StoreUsage(len(found), sum(part.is_open for part in found), size, idle)

    def _rows(self, snapshot: Snapshot, namespace: str, pinned: Sequence[str]) -> _Rows:
        driver = self._drivers.default.name
        unused = disuse.unused(snapshot, namespace, self._collector.is_pinned)
        going = [row for image in unused for row in image.rows]
        blobs = reach.blobs_beyond(snapshot, now_ns=MAX_NS, pinned=pinned)
        layers = reach.layers_beyond(snapshot, now_ns=MAX_NS, driver=driver, pinned=pinned)
        more_blobs = reach.blobs_beyond(snapshot, now_ns=MAX_NS, pinned=pinned, going=going)
        more_layers = reach.layers_beyond(snapshot, now_ns=MAX_NS, driver=driver, pinned=pinned, going=going)
        reclaimable = more_blobs.size_bytes - blobs.size_bytes + more_layers.size_bytes - layers.size_bytes
        images, size = _images(snapshot, namespace, driver)
        [all_blobs] = snapshot.execute(
            "SELECT count(*), coalesce(sum(coalesce(stored_bytes, size_bytes)), 0) FROM blobs"
        )
        [all_layers] = snapshot.execute(
            "SELECT count(*), coalesce(sum(size_bytes), 0) FROM snapshots WHERE namespace = ?", (SHARED,)
        )
        own = [record for record in trees.everything(snapshot, namespace, None) if record.namespace == namespace]
        return _Rows(
            [self._dated(image) for image in images],
            size,
            reclaimable,
            StoreUsage(all_blobs[0], all_blobs[0] - blobs.count, all_blobs[1], blobs.size_bytes),
            StoreUsage(all_layers[0], all_layers[0] - layers.count, all_layers[1], layers.size_bytes),
            own,
        )

    def _dated(self, image: ImageUsage) -> ImageUsage:
        try:
            created = self._details.get(image.manifest).config.created
        except (CorralError, OSError):  # a blob of it is gone: `system check` tells
            created = None
        if created is None:
            return image
        return dataclasses.replace(image, created_ns=int(created.timestamp()) * 10**9)


def _images(snapshot: Snapshot, namespace: str, driver: str) -> tuple[list[ImageUsage], int]:
    """Each image of the namespace; and the bytes of all that they refer to."""
    sizes, parts = _parts(snapshot, namespace, driver)
    users = Counter(part for held in parts.values() for part in held)
    found = []
    for row in snapshot.execute(
        "SELECT image_id, json_group_array(name) AS names, max(used_ns) AS used_ns, manifest_type, manifest_digest,"
        " manifest_size FROM images WHERE namespace = ? GROUP BY image_id ORDER BY max(used_ns) DESC, image_id",
        (namespace,),
    ):
        held = parts[row["image_id"]]
        found.append(
            ImageUsage(
                image_id=row["image_id"],
                names=tuple(sorted(name for name in json.loads(row["names"]) if name)),
                manifest=Descriptor(row["manifest_type"], Digest(row["manifest_digest"]), row["manifest_size"]),
                used_ns=row["used_ns"],
                size_bytes=sum(sizes[part] for part in held),
                shared_bytes=sum(sizes[part] for part in held if users[part] > 1),
                snapshots=tuple(trees.users_of_image(snapshot, namespace, row["image_id"])),
            )
        )
    return found, sum(sizes[part] for part in users)


def _parts(snapshot: Snapshot, namespace: str, driver: str) -> tuple[Sizes, Mapping[str, AbstractSet[str]]]:
    """Digests and numbers of layers that each image id refers to, and what each of them takes."""
    sizes: dict[str, int] = {
        row[0]: row[1] for row in snapshot.execute("SELECT digest, coalesce(stored_bytes, size_bytes) FROM blobs")
    }
    children: dict[str, list[str]] = {}
    for row in snapshot.execute("SELECT parent, child FROM blob_edges"):
        children.setdefault(row[0], []).append(row[1])
    uppermost: dict[str, str] = {}
    for row in snapshot.execute(
        "SELECT id, key, parent, size_bytes FROM snapshots WHERE namespace = ? AND driver = ?", (SHARED, driver)
    ):
        layer = f"layer {row['id']}"
        uppermost[row["key"]] = layer
        sizes[layer] = row["size_bytes"]
        if row["parent"] is not None:
            children[layer] = [f"layer {row['parent']}"]
    parts: dict[str, set[str]] = {}
    for row in snapshot.execute(
        "SELECT image_id, target_digest, manifest_digest, chain_id FROM images WHERE namespace = ?", (namespace,)
    ):
        roots = [row["target_digest"], row["manifest_digest"]]
        if row["chain_id"] in uppermost:
            roots.append(uppermost[row["chain_id"]])
        parts.setdefault(row["image_id"], set()).update(_reached(roots, children))
    return sizes, parts


def _reached(roots: Sequence[str], children: Mapping[str, Sequence[str]]) -> set[str]:
    reached: set[str] = set()
    todo = list(roots)
    while todo:
        part = todo.pop()
        if part not in reached:
            reached.add(part)
            todo += children.get(part, ())
    return reached
