"""Blobs that are not kept: dropped once their layer is unpacked, and made again when somebody wants their bytes.

    recipes/<hex>       how blob <hex> is made again out of its layer; see corral.images.layers.recipe

A blob is dropped only when it was made again once, byte for byte; one that cannot be, since nothing here compresses as
whoever made it did, stays. It stays known either way: with its row, its size, its digest. While its bytes are needed
its file is there again, for as long as that takes.

    file ... recipe written, proven ... row in `recipes` ... file gone ... (file there again, gone again)
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from corral.images import trees
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore
from corral.images.details import DetailsCache
from corral.images.digest import Digest, digest_of_hex
from corral.images.drivers import Drivers
from corral.images.errors import explained
from corral.images.layers.errors import BadLayer
from corral.images.snapshotter import TreeId
from corral.images.store import uninterrupted, write_much
from corral.images.workers import Workers
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, FailedPrecondition
from corral.store import Database, Snapshot, Transaction, failpoint
from corral.store.files import fsync_directory

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a blob is made of."""

    tree: TreeId
    driver: str


class Recipes:
    """See the module."""

    def __init__(
        self,
        database: Database,
        content: ContentStore,
        drivers: Drivers,
        workers: Workers,
        collector: Collector,
        details: DetailsCache,
    ) -> None:
        self._database = database
        self._content = content
        self._drivers = drivers
        self._workers = workers
        self._collector = collector
        self._details = details
        self._users: Counter[Digest] = Counter()
        self._making: dict[Digest, asyncio.Lock] = {}
        content.whole = self.whole

    def recover(self) -> None:
        """Finish, or undo, what an earlier process was killed in. Blocking; before anything is served."""
        dropped, there = self._database.read_sync(known), set(self._content.recipes())
        for digest in there - dropped:
            self._content.recipe(digest).unlink(missing_ok=True)
        for digest in dropped & there:  # it was needed, or was just being dropped
            self._content.path(digest).unlink(missing_ok=True)
        if lost := dropped - there:
            self._database.write_sync(lambda t: _forget(t, lost))

    # Dropping

    async def spare(self, record: ImageRecord) -> None:
        """Drop the blobs of an image's layers, as far as they can be made again. One that cannot be is no error."""
        details = await run_blocking(self._details.get, record.manifest)
        digests = [descriptor.digest for _, _, descriptor in details.layers]
        async with self._collector.pinned([record.manifest.digest, *digests, *details.chain]):
            for chain_id, _, descriptor in details.layers:
                try:
                    await self._spare(chain_id, descriptor.digest)
                except (CorralError, BadLayer, OSError) as e:
                    log.warning("images.blob_not_dropped", blob=descriptor.digest, error=str(e))

    async def _spare(self, chain_id: str, digest: Digest) -> None:
        driver = self._drivers.default.name
        layer = self._database.read_sync(lambda s: trees.layer(s, chain_id, driver))
        if layer is None or not self._content.path(digest).exists() or self._content.recipe(digest).exists():
            return
        directory = await run_blocking(self._content.make_ingest_directory)
        target = directory / "recipe"
        try:
            job = {
                "op": "recipe",
                "blob": str(self._content.path(digest)),
                "layer": self._place(_Layer(layer.id, layer.driver)),
                "digest": digest,
                "chain_id": chain_id,
                "target": str(target),
            }
            answer = await self._workers.run(job, lambda _done: None)
            if answer["found"]:
                await uninterrupted(self._drop(digest, layer.id, target))
        finally:
            target.unlink(missing_ok=True)
            await run_blocking(directory.rmdir)

    async def _drop(self, digest: Digest, tree: TreeId, target: Path) -> None:
        async with self._collector.changing:
            size = await run_blocking(self._place_recipe, target, digest)
            failpoint("images.recipe.before_row")
            await write_much(self._database, lambda t: insert(t, digest, tree, size))
            failpoint("images.recipe.after_row")
            self._drop_file(digest)

    def _place_recipe(self, target: Path, digest: Digest) -> int:
        """Durably: the blob goes as soon as it is there."""
        with target.open("rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        path = self._content.recipe(digest)
        target.rename(path)
        fsync_directory(path.parent)
        return size

    def _drop_file(self, digest: Digest) -> None:
        if not self._users[digest]:
            del self._users[digest]
            self._content.path(digest).unlink(missing_ok=True)

    # Making again

    @asynccontextmanager
    async def whole(self, path: Path) -> AsyncIterator[None]:
        """Within the block the file of a blob is there, unless the blob itself is not. Raises FailedPrecondition,
        ResourceExhausted."""
        digest = digest_of_hex(path.name)
        if digest is None or not self._content.is_blob(path) or not self._content.recipe(digest).exists():
            yield
            return
        self._users[digest] += 1
        try:
            async with self._making.setdefault(digest, asyncio.Lock()):
                await self._make(digest)
            yield
        finally:
            self._users[digest] -= 1
            await uninterrupted(self._done_with(digest))

    async def _done_with(self, digest: Digest) -> None:
        async with self._collector.changing:
            self._making.pop(digest, None)
            if self._content.recipe(digest).exists():
                self._drop_file(digest)

    async def _make(self, digest: Digest) -> None:
        """Unless its file is there, for somebody else who wants it."""
        if self._content.path(digest).exists():
            return
        layer = self._database.read_sync(lambda s: _layer(s, digest))
        if layer is None:
            raise _unmakeable(digest, "its layer is gone")
        directory = await run_blocking(self._content.make_ingest_directory)
        target = directory / "blob"
        job = {
            "op": "remake",
            "recipe": str(self._content.recipe(digest)),
            "layer": self._place(layer),
            "target": str(target),
        }
        try:
            answer = await self._workers.run(job, lambda _done: None)
            if answer["digest"] != digest:
                raise _unmakeable(digest, "its layer was changed on disk")
            await run_blocking(self._content.publish, target, digest)
        except BadLayer as e:
            raise _unmakeable(digest, str(e)) from e
        except OSError as e:
            raise explained(e, f"cannot make blob {digest} again") from e
        finally:
            target.unlink(missing_ok=True)
            await run_blocking(directory.rmdir)

    def _place(self, layer: _Layer) -> str:
        """Where the layer alone is: a directory, or a file system in a file or on a device."""
        [mount] = self._drivers.of(layer.driver).mounts(layer.tree, (layer.tree,), writable=False)
        part, _, _ = mount.source[1:].partition("/")
        return mount.parts[int(part)].source if mount.source.startswith("@") else mount.source


def _unmakeable(digest: Digest, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"blob {digest} was not kept and cannot be made again, for {why}: pull or import its image again",
        reason="NO_BLOB",
    )


def known(snapshot: Snapshot) -> set[Digest]:
    """The blobs that are not kept."""
    return {Digest(row[0]) for row in snapshot.execute("SELECT digest FROM recipes")}


def _layer(snapshot: Snapshot, digest: Digest) -> _Layer | None:
    row = snapshot.one(
        "SELECT id, driver FROM recipes JOIN snapshots ON snapshots.id = recipes.tree WHERE digest = ?", (digest,)
    )
    return None if row is None else _Layer(TreeId(row["id"]), row["driver"])


def insert(transaction: Transaction, digest: Digest, tree: TreeId, size_bytes: int) -> None:
    """The blob is made of that layer; size_bytes: of the recipe, which takes the blob's place on disk."""
    transaction.execute("INSERT OR REPLACE INTO recipes (digest, tree) VALUES (?, ?)", (digest, tree))
    transaction.execute("UPDATE blobs SET stored_bytes = ? WHERE digest = ?", (size_bytes, digest))


def _forget(transaction: Transaction, digests: Iterable[Digest]) -> None:
    for digest in digests:
        transaction.execute("DELETE FROM recipes WHERE digest = ?", (digest,))
        transaction.execute("UPDATE blobs SET stored_bytes = NULL WHERE digest = ?", (digest,))


def forget_made_of(transaction: Transaction, tree: TreeId) -> None:
    """No blob can be made of that layer any more."""
    rows = transaction.execute("SELECT digest FROM recipes WHERE tree = ?", (tree,))
    _forget(transaction, [Digest(row[0]) for row in rows])
