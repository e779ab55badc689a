"""The moment in which images become visible: files and trees are renamed to their places, then one transaction.

Whoever brings images, an archive or a registry, has staged all of it before and proven it. What is here stays here
meanwhile, as the bringer has pinned it.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.images import catalog, holders, leases
from corral.images.archives.found import FoundImage
from corral.images.archives.intake import StoredFile
from corral.images.blobs import insert_blob, is_stored
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore
from corral.images.digest import Digest
from corral.images.policy.gate import Gate
from corral.images.reference import Reference
from corral.images.store import uninterrupted, write_much
from corral.images.unpacker import Staged, Unpacker
from corral.kernel.syncfs import syncfs
from corral.rpc.blocking import run_blocking
from corral.store import Database, Snapshot, Transaction, failpoint


@dataclass(frozen=True, slots=True)
class Admitted:
    """For whom, and how, images are taken."""

    namespace: str
    topic: str  # of the journal, one row per name
    lease: str = ""
    name: Reference | None = None  # instead of the names that they come with
    unpacked: bool = True


class Admission:
    """See the module."""

    def __init__(
        self, database: Database, content: ContentStore, unpacker: Unpacker, collector: Collector, gate: Gate
    ) -> None:
        self._gate = gate
        self._database = database
        self._content = content
        self._unpacker = unpacker
        self._collector = collector

    def check(self, how: Admitted, images: Sequence[FoundImage]) -> None:
        """Raises PermissionDenied where the policy refuses an image its name; before anything is made of it, then."""

        def look(snapshot: Snapshot) -> None:
            for image in images:
                for name in _names(how, image):
                    self._gate.check_name(snapshot, name, image.target.digest, image.manifest.digest)

        self._database.read_sync(look)

    async def admit(
        self, how: Admitted, images: Sequence[FoundImage], staged: Sequence[list[Staged]]
    ) -> list[ImageRecord]:
        """All of it or nothing, also if the caller is cancelled. What became a layer is taken out of `staged`.

        Raises PermissionDenied where the policy refuses an image its name.
        """
        return await uninterrupted(self._admit(how, images, staged))

    async def _admit(
        self, how: Admitted, images: Sequence[FoundImage], staged: Sequence[list[Staged]]
    ) -> list[ImageRecord]:
        """Nothing may fail half-way: what was moved and got no row is moved out again."""
        blobs = {digest: file for image in images for digest, file in image.blobs.items()}
        layers = {layer.chain_id: layer for group in staged for layer in group}
        if blobs:
            await run_blocking(_sync_files, [file.path for file in blobs.values()])
        async with self._collector.changing:
            new_blobs, new_layers = self._database.read_sync(
                lambda s: (self._missing_blobs(s, blobs), self._unpacker.wanted(s, list(layers.values())))
            )
            try:
                await run_blocking(self._place, new_blobs, new_layers)
                failpoint("images.admit.before_commit")
                records = await write_much(
                    self._database, lambda t: self._insert(t, how, images, new_blobs, new_layers)
                )
            except BaseException:
                await asyncio.shield(run_blocking(self._content.remove, list(new_blobs)))
                raise
            for group in staged:
                group[:] = [layer for layer in group if layer not in new_layers]
        await self._database.persist()
        failpoint("images.admit.after_commit")
        self._collector.on_growth()
        return records

    def _missing_blobs(self, snapshot: Snapshot, blobs: dict[Digest, StoredFile]) -> dict[Digest, StoredFile]:
        """Those that are not here; a row whose file somebody removed does not count."""
        return {d: file for d, file in blobs.items() if not is_stored(snapshot, self._content, d)}

    def _place(self, blobs: dict[Digest, StoredFile], layers: Sequence[Staged]) -> None:
        for digest, file in blobs.items():
            self._content.publish(file.path, digest)
        if blobs:
            self._content.sync_names()
        self._unpacker.place(layers)

    def _insert(
        self,
        transaction: Transaction,
        how: Admitted,
        images: Sequence[FoundImage],
        blobs: dict[Digest, StoredFile],
        layers: Sequence[Staged],
    ) -> list[ImageRecord]:
        now = catalog.now_ns()
        for digest, file in blobs.items():
            insert_blob(transaction, digest, file.size_bytes)
        records: list[ImageRecord] = []
        for image in images:
            holders.record(transaction, how.namespace, image.blobs)
            for parent, child in image.edges:
                transaction.execute("INSERT OR IGNORE INTO blob_edges (parent, child) VALUES (?, ?)", (parent, child))
            for digest in {image.target.digest, *(child for _, child in image.edges)}:  # its time of grace is over
                transaction.execute("UPDATE blobs SET keep_until_ns = 0 WHERE digest = ?", (digest,))
            if how.unpacked:
                self._unpacker.insert(transaction, image.details, layers)
                transaction.journal(
                    "image.unpacked", image.image_id, {"chain_id": image.details.chain_id}, namespace=how.namespace
                )
            records += self._name(transaction, how, image, now)
        return records

    def _name(self, transaction: Transaction, how: Admitted, image: FoundImage, now: int) -> list[ImageRecord]:
        records = []
        chain_id = self._unpacker.chain_id_if_here(transaction, image.details)
        for name in _names(how, image):
            self._gate.check_name(transaction, name, image.target.digest, image.manifest.digest)
            record = ImageRecord(
                namespace=how.namespace,
                name=str(name) if name else "",
                image_id=image.image_id,
                target=image.target,
                manifest=image.manifest,
                chain_id=chain_id,
                updated_ns=now,
            )
            catalog.set_name(transaction, record)
            leases.hold(transaction, how.namespace, how.lease, "blob", image.target.digest)
            transaction.journal(
                how.topic, record.name or record.image_id, {"id": record.image_id}, namespace=how.namespace
            )
            records.append(record)
        return records


def _names(how: Admitted, image: FoundImage) -> Sequence[Reference | None]:
    """None: it gets none."""
    return (how.name,) if how.name else (image.names or (None,))


def _sync_files(paths: Sequence[Path]) -> None:
    """One flush for all: they lie in one directory."""
    fd = os.open(paths[0].parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs(fd)
    finally:
        os.close(fd)
