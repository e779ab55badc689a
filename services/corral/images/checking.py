"""Rows, blobs, trees and partial downloads compared while the leaf runs.

What a start would take for left over is left over here too, but for what this process itself has on its way: the trees
that it has numbered, the files that it is writing, and what is placed under the collector's lock.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from corral.images import catalog, recipes, trees
from corral.images.collector import Collector
from corral.images.content import ContentStore, discard, is_proven
from corral.images.details import DetailsCache
from corral.images.digest import Digest
from corral.images.drivers import Drivers
from corral.images.lost_layers import LostLayers
from corral.images.partials import Partials
from corral.images.rebuilding import Rebuilder
from corral.images.snapshotter import Mount, Snapshotter, TreeId
from corral.images.store import SHARED, uninterrupted, write_much
from corral.images.tending import Tending
from corral.images.trees import Kind, TreeRecord
from corral.images.unpacker import TreeIds, Unpacker
from corral.kernel.aufs import split_branches
from corral.kernel.mount import umount
from corral.rpc.blocking import run_blocking
from corral.rpc.checking import Found
from corral.rpc.errors import CorralError
from corral.store import Database, Snapshot, Transaction
from corral.store.mountinfo import mounts_below

# Documents are read and hashed in every check, layers only in a deep one.
MAX_HASHED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _Blob:
    digest: Digest
    size_bytes: int
    users: tuple[str, ...]
    """The images that have it, by name."""
    is_document: bool


class Checker:
    """See the module."""

    def __init__(
        self,
        database: Database,
        content: ContentStore,
        drivers: Drivers,
        details: DetailsCache,
        unpacker: Unpacker,
        collector: Collector,
        partials: Partials,
        tending: Tending,
        ids: TreeIds,
        rebuilder: Rebuilder,
    ) -> None:
        self._database = database
        self._content = content
        self._drivers = drivers
        self._collector = collector
        self._partials = partials
        self._tending = tending
        self._ids = ids
        self._rebuilder = rebuilder
        self._lost_layers = LostLayers(database, content, drivers, details, unpacker)
        self._file = database.path.stat().st_ino

    async def look(self, *, deep: bool = False) -> Sequence[Found]:
        """All that does not fit. deep: blobs are hashed, whatever they are."""
        if self._rebuilder.is_needed():
            return [
                Found(
                    f"database {self._database.path}",
                    "was lost or damaged and is a new one, which does not know what is on disk",
                    "repair makes it anew from blobs and trees",
                    self._rebuilder.rebuild,
                )
            ]
        found = await run_blocking(self._database_findings)
        if found:  # nothing can be compared with what is not there, or not true
            return found
        async with self._collector.changing:
            found += await run_blocking(self._blob_findings)
        if deep:
            found += await run_blocking(self._content_findings)
        found += await run_blocking(self._file_findings)
        return found + await run_blocking(self._tree_findings)

    # The database

    def _database_findings(self) -> list[Found]:
        subject = f"database {self._database.path}"
        remedy = "restart corrald, and check again with --repair"
        try:
            if self._database.path.stat().st_ino != self._file:
                return [Found(subject, "was replaced while it was in use", remedy)]
        except FileNotFoundError:
            return [Found(subject, "was removed while it was in use", remedy)]
        try:
            [row] = self._database.read_sync(lambda s: s.execute("PRAGMA quick_check(1)"))
            wrong = "" if row[0] == "ok" else str(row[0])
        except OSError as e:
            wrong = str(e)
        return [Found(subject, f"is damaged ({wrong})", remedy)] if wrong else []

    # Blobs

    def _blob_findings(self) -> list[Found]:
        rows = self._database.read_sync(_blobs)
        dropped = self._database.read_sync(recipes.known)
        stored, told = set(self._content.stored()), set(self._content.recipes())
        found = [
            Found(
                f"blob {digest}",
                "has no row in the database",
                "repair removes it",
                partial(self._remove_blob, digest),
            )
            for digest in sorted((stored | told) - rows.keys())
        ]
        found += [
            Found(
                f"recipe of blob {digest}",
                "is there, but the blob is kept",
                "repair removes it",
                partial(run_blocking, self._content.recipe(digest).unlink, missing_ok=True),
            )
            for digest in sorted((told & rows.keys()) - dropped)
        ]
        for digest, blob in sorted(rows.items()):
            if digest in dropped & told:  # its file is there only while it is needed
                continue
            problem = "is gone" if digest not in stored else self._damage(blob)
            if problem:
                found.append(self._lost_blob(blob, problem))
        return found

    def _damage(self, blob: _Blob) -> str:
        size = self._content.path(blob.digest).stat().st_size
        if size != blob.size_bytes:
            return f"has {size} bytes instead of {blob.size_bytes}"
        if blob.is_document and size <= MAX_HASHED_BYTES:
            try:
                self._content.read(blob.digest, max_bytes=MAX_HASHED_BYTES)
            except CorralError:
                return "was changed on disk"
        return ""

    def _content_findings(self) -> list[Found]:
        """Under no lock, since it takes long: blobs come whole, and one that goes meanwhile is not one to tell of."""
        found = []
        for digest, blob in sorted(self._database.read_sync(_blobs).items()):
            path = self._content.path(digest)
            with suppress(FileNotFoundError):
                if blob.is_document or path.stat().st_size != blob.size_bytes or is_proven(path, digest):
                    continue
                if path.exists():
                    found.append(self._lost_blob(blob, "was changed on disk"))
        return found

    def _lost_blob(self, blob: _Blob, problem: str) -> Found:
        names = ", ".join(blob.users)
        remedy = "repair forgets it"
        if blob.users and blob.is_document:
            remedy = f"repair removes what it is needed for ({names}): pull or import that again"
        elif blob.users:
            remedy = f"repair forgets it: pull or import {names} again before it is pushed or saved"
        return Found(f"blob {blob.digest}", problem, remedy, partial(self._forget_blob, blob.digest))

    async def _remove_blob(self, digest: Digest) -> None:
        async with self._collector.changing:
            if digest not in self._database.read_sync(_blobs):
                await run_blocking(self._content.remove, [digest])

    async def _forget_blob(self, digest: Digest) -> None:
        async with self._collector.changing:
            await write_much(self._database, lambda t: _forget_blob(t, digest))
            await run_blocking(self._content.remove, [digest])
        await self._collector.collect()

    # Files

    def _file_findings(self) -> list[Found]:
        found = [
            Found(f"file {path}", "is nothing of ours", "repair removes it", partial(run_blocking, discard, path))
            for path in sorted(self._content.strangers())
        ]
        found += [
            Found(f"mount {path}", "is none that we need", "repair unmounts it", partial(run_blocking, umount, path))
            for path in mounts_below(self._database.path.parent)
            if path.parent != self._database.path.parent  # such a one is the administrator's
        ]
        for name, problem in sorted(self._partials.leftovers(self._is_stored).items()):
            found.append(
                Found(
                    f"partial download {name}",
                    problem,
                    "repair removes it",
                    partial(run_blocking, self._partials.remove, name),
                )
            )
        return found

    def _is_stored(self, digest: str) -> bool:
        known = self._database.read_sync(lambda s: s.one("SELECT 1 FROM blobs WHERE digest = ?", (digest,)))
        return known is not None

    # Trees

    def _tree_findings(self) -> list[Found]:
        """What is on disk is read first: a tree that is made meanwhile has its row after it."""
        there = {driver.name: set(driver.trees()) for driver in self._drivers}
        records = self._database.read_sync(_trees)
        found = []
        for driver, numbers in there.items():
            found += [self._stray_tree(driver, tree) for tree in sorted(numbers) if self._is_stray(tree, records)]
        for tree, why in self._tending.stuck.items():
            found.append(
                Found(
                    f"tree {tree}",
                    f"could not be removed ({why})",
                    "repair tries again",
                    partial(self._remove_tree, tree),
                )
            )
        for record in sorted(records.values(), key=lambda r: len(r.chain)):
            found += self._tree_of(record, there)
        return found

    def _is_stray(self, tree: TreeId, records: Mapping[TreeId, TreeRecord]) -> bool:
        return tree not in records and not self._ids.is_own(tree) and not self._tending.is_going(tree)

    def _stray_tree(self, driver: str, tree: TreeId) -> Found:
        return Found(
            f"tree {tree} of {driver}",
            "belongs to no snapshot",
            "repair removes it",
            partial(self._remove_tree, tree),
        )

    async def _remove_tree(self, tree: TreeId) -> None:
        if tree not in self._database.read_sync(_trees):
            self._tending.remove([tree])
            await self._tending.done()

    def _tree_of(self, record: TreeRecord, there: Mapping[str, set[TreeId]]) -> Iterable[Found]:
        """What is wrong with the tree of a row. One whose driver cannot run here any more is left alone."""
        if record.driver not in there:
            return
        driver = self._drivers.of(record.driver)
        here = record.id in there[record.driver]
        subject = f"layer {record.key}" if record.namespace == SHARED else f"snapshot {record.namespace}/{record.key}"
        if record.kind is Kind.COMMITTED:
            if not driver.is_layer(record.id):
                yield self._lost_layer(subject, record, driver, here=here)
            return
        below = (driver.is_layer(layer) for layer in record.chain)
        if all(below) and (gone := _gone(self._mounts(record, driver))):
            yield self._lost_tree(subject, record, driver, gone, here=here)

    def _mounts(self, record: TreeRecord, driver: Snapshotter) -> Sequence[Mount]:
        writable = record.kind is Kind.ACTIVE
        return driver.mounts(record.id, record.chain, writable=writable, quota_bytes=record.quota_bytes)

    def _lost_layer(self, subject: str, record: TreeRecord, driver: Snapshotter, *, here: bool) -> Found:
        if here:
            return Found(
                subject,
                "was not committed to its end",
                "repair finishes that",
                partial(run_blocking, driver.adopt, record.id),
            )
        remedy, repair = self._lost_layers.remedy(record)
        return Found(subject, "has lost its tree", remedy, repair)

    def _lost_tree(self, subject: str, record: TreeRecord, driver: Snapshotter, gone: Path, *, here: bool) -> Found:
        if here and record.kind is Kind.ACTIVE:
            return Found(subject, f"has lost {gone}", "save what is left of it, and make it again")
        remedy = "repair makes a new one"
        if record.kind is Kind.ACTIVE:
            remedy = "repair makes an empty one: what was written to it is lost"
        return Found(subject, "has lost its tree", remedy, partial(self._make_again, record, driver))

    async def _make_again(self, record: TreeRecord, driver: Snapshotter) -> None:
        def make() -> None:
            driver.remove(record.id)
            writable = record.kind is Kind.ACTIVE
            driver.prepare(record.id, record.chain, writable=writable, quota_bytes=record.quota_bytes)

        await uninterrupted(run_blocking(make))


def _blobs(snapshot: Snapshot) -> dict[Digest, _Blob]:
    """Every row, with the images that have it."""
    users: dict[str, set[str]] = {}
    documents: set[str] = set()
    for row in snapshot.execute(
        "WITH RECURSIVE reached(name, digest) AS ("
        " SELECT coalesce(nullif(name, ''), image_id), target_digest FROM images"
        " UNION SELECT coalesce(nullif(name, ''), image_id), manifest_digest FROM images"
        " UNION SELECT name, child FROM blob_edges JOIN reached ON parent = digest"
        ") SELECT name, digest FROM reached"
    ):
        users.setdefault(row["digest"], set()).add(row["name"])
    documents.update(row[0] for row in snapshot.execute("SELECT parent FROM blob_edges"))
    documents.update(row[0] for row in snapshot.execute("SELECT image_id FROM images"))
    return {
        Digest(row["digest"]): _Blob(
            Digest(row["digest"]),
            row["size_bytes"],
            tuple(sorted(users.get(row["digest"], ()))),
            row["digest"] in documents,
        )
        for row in snapshot.execute("SELECT digest, size_bytes FROM blobs")
    }


def _forget_blob(transaction: Transaction, digest: Digest) -> None:
    """With the images that are nothing without it."""
    rows = transaction.execute(
        "SELECT namespace, name FROM images WHERE ? IN (target_digest, manifest_digest, image_id)", (digest,)
    )
    for row in rows:
        records = catalog.everything(transaction, row["namespace"])
        going = [r for r in records if digest in (r.target.digest, r.manifest.digest, r.image_id)]
        catalog.remove(transaction, going, reason="a part of it was lost")
    transaction.execute("DELETE FROM blob_edges WHERE child = ?", (digest,))
    transaction.execute("DELETE FROM blobs WHERE digest = ?", (digest,))


def _trees(snapshot: Snapshot) -> dict[TreeId, TreeRecord]:
    return {record.id: record for record in trees.of_all(snapshot)}


def _gone(mounts: Sequence[Mount]) -> Path | None:
    """The first path that a mount needs and that is not there; what is put together from parts is in those."""
    for mount in mounts:
        if (gone := _gone(mount.parts)) is not None:
            return gone
        options = dict(option.partition("=")[::2] for option in mount.options)
        paths = [options[key] for key in ("upperdir", "workdir") if key in options]
        paths += options.get("lowerdir", "").split(":")
        paths += [directory for directory, _ in split_branches(options.get("br", ""))]
        if mount.source.startswith("/"):
            paths.append(mount.source)
        for path in paths:
            if path.startswith("/") and not os.path.lexists(path):
                return Path(path)
    return None
