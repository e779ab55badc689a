"""Layers that have lost their trees: unpacked again where an image tells of what, else forgotten if none needs them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from corral.images import recipes, trees
from corral.images.blobs import is_stored
from corral.images.content import ContentStore
from corral.images.details import DetailsCache
from corral.images.digest import Digest
from corral.images.drivers import Drivers
from corral.images.model import Descriptor
from corral.images.snapshotter import TreeId
from corral.images.store import SHARED
from corral.images.trees import TreeRecord
from corral.images.unpacker import Unpacker
from corral.rpc.errors import CorralError
from corral.store import Database, Snapshot, Transaction

type Remedy = tuple[str, Callable[[], Awaitable[object]] | None]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a layer comes from."""

    blob: Digest
    diff_id: Digest


class LostLayers:
    """See the module. Blocking, but for the repairs."""

    def __init__(
        self, database: Database, content: ContentStore, drivers: Drivers, details: DetailsCache, unpacker: Unpacker
    ) -> None:
        self._database = database
        self._content = content
        self._drivers = drivers
        self._details = details
        self._unpacker = unpacker

    def remedy(self, record: TreeRecord) -> Remedy:
        """What can be done about it, in words, and how."""
        origin = self._origin(record)
        if origin is not None:
            path = self._content.path(origin.blob)
            return (
                f"repair unpacks it again from blob {origin.blob}",
                partial(self._unpacker.restore, record, path, origin.diff_id),
            )
        if not self._database.read_sync(lambda s: trees.children_of(s, record.id)):
            return "repair forgets it", partial(self._forget, record.id)
        return "remove the containers on it, and pull or import their image again", None

    def _origin(self, record: TreeRecord) -> _Origin | None:
        if record.namespace != SHARED or record.driver != self._drivers.default.name:
            return None
        for manifest in self._database.read_sync(_manifests):
            try:
                details = self._details.get(manifest)
            except CorralError:  # it has lost its documents
                continue
            for chain_id, diff_id, descriptor in details.layers:
                if chain_id == record.key and self._is_here(descriptor.digest):
                    return _Origin(descriptor.digest, diff_id)
        return None

    def _is_here(self, digest: Digest) -> bool:
        """Its file: one that is made of this very layer is of no use."""
        stored = self._database.read_sync(lambda s: is_stored(s, self._content, digest))
        return stored and self._content.path(digest).exists()

    async def _forget(self, tree: TreeId) -> None:
        def forget(transaction: Transaction) -> None:
            recipes.forget_made_of(transaction, tree)
            trees.delete(transaction, tree)

        await self._database.write(forget)


def _manifests(snapshot: Snapshot) -> list[Descriptor]:
    rows = snapshot.execute("SELECT DISTINCT manifest_type, manifest_digest, manifest_size FROM images")
    return [Descriptor(row[0], Digest(row[1]), row[2]) for row in rows]
