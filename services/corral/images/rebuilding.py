"""The database made anew from what is on disk, after it was lost or damaged.

Blobs tell by their digests what they are, and manifests among them what they refer to; trees and names are told by
their marks (corral.images.marks). What has no mark any more can be told by nobody: a manifest is an image without a
name then, and a tree goes.

A database is lost when there is none but content is there. As long as nobody had it made anew, a file says so: nothing
of the content is taken for a leftover then, and rows may be added beside it.
"""

import errno
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from corral.images import catalog, holders, recipes, trees
from corral.images.blobs import insert_blob
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore, is_proven
from corral.images.details import DetailsCache
from corral.images.digest import Digest
from corral.images.drivers import Drivers
from corral.images.layers import recipe
from corral.images.marks import DIRECTORY, Marked, Marks
from corral.images.model import (
    MAX_MANIFEST_BYTES,
    Descriptor,
    Index,
    Manifest,
    parse_manifest_or_index,
)
from corral.images.platforms import choose, host_platform
from corral.images.snapshotter import Snapshotter, TreeId
from corral.images.store import MIGRATIONS, SHARED, write_much
from corral.images.tending import Tending
from corral.images.trees import Kind, TreeRecord
from corral.images.unpacker import TreeIds
from corral.rpc.blocking import run_blocking
from corral.rpc.context import DEFAULT_NAMESPACE
from corral.rpc.errors import CorralError
from corral.store import Database, Duplicate, Transaction, atomic_write

log = structlog.get_logger()

DATABASE, LOST = "images.db", "database-lost"
GRACE_NS = 3600 * 10**9


def open_or_renew(root: Path) -> Database:
    """The database of the leaf; a damaged one is moved aside. See is_lost(). Blocking. Raises OSError, ValueError."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = root / DATABASE
    is_new = not path.exists()
    try:
        database = _opened(path)
    except OSError as e:
        if e.errno != errno.EUCLEAN:
            raise
        _move_aside(path, str(e))
        is_new = True
        database = _opened(path)
    if is_new and _has_content(root):
        atomic_write(root / LOST, b"")
        remedy = "`corral system check --repair` makes it anew from what is on disk"
        log.error("images.database_lost", path=str(path), remedy=remedy)
    return database


def _opened(path: Path) -> Database:
    """Raises OSError(EUCLEAN) if it is damaged."""
    # WAL with NORMAL: what must outlive a loss of power calls persist(), beside which others may write.
    database = Database(path, MIGRATIONS, durable=False, on_loop=True)
    try:
        [row] = database.read_sync(lambda s: s.execute("PRAGMA quick_check(1)"))
        if row[0] != "ok":
            raise OSError(errno.EUCLEAN, f"database: {row[0]}", str(path))
    except BaseException:
        database.close()
        raise
    return database


def _move_aside(path: Path, reason: str) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    log.error("images.database_damaged", path=str(path), reason=reason, kept_as=f"{path.name}.{stamp}")
    for suffix in ("", "-wal", "-shm"):
        old = path.with_name(path.name + suffix)
        if old.exists():
            old.rename(path.with_name(f"{path.name}.{stamp}{suffix}"))


def _has_content(root: Path) -> bool:
    places = (*(root / "blobs").glob("*"), root / DIRECTORY)
    return any(place.is_dir() and any(place.iterdir()) for place in places)


def is_lost(root: Path) -> bool:
    """Whether the database does not know all that is on disk."""
    return (root / LOST).exists()


@dataclass(slots=True)
class _Blobs:
    """What is among the blobs."""

    sizes: dict[Digest, int] = field(default_factory=dict)
    documents: dict[Digest, Manifest | Index] = field(default_factory=dict)
    damaged: list[Digest] = field(default_factory=list)
    recipes: dict[Digest, str] = field(default_factory=dict)
    """Of those that were not kept, the chain ids of their layers."""

    @property
    def edges(self) -> set[tuple[Digest, Digest]]:
        """From documents to what they refer to and is here."""
        return {
            (parent, child.digest)
            for parent, document in self.documents.items()
            for child in _children(document)
            if child.digest in self.sizes
        }

    def is_whole(self, digest: Digest) -> bool:
        """Whether all that a manifest refers to is here."""
        document = self.documents.get(digest)
        return isinstance(document, Manifest) and all(child.digest in self.sizes for child in _children(document))

    def reached(self, digest: Digest) -> set[Digest]:
        """A blob, and all that it refers to."""
        reached: set[Digest] = set()
        todo = [digest]
        while todo:
            blob = todo.pop()
            if blob in self.sizes and blob not in reached:
                reached.add(blob)
                document = self.documents.get(blob)
                todo += [child.digest for child in _children(document)] if document is not None else []
        return reached

    def descriptor(self, digest: Digest) -> Descriptor:
        return Descriptor(self.documents[digest].media_type, digest, self.sizes[digest])


def _children(document: Manifest | Index) -> Iterable[Descriptor]:
    return document.manifests if isinstance(document, Index) else (document.config, *document.layers)


class Rebuilder:
    """See the module."""

    def __init__(
        self,
        root: Path,
        database: Database,
        content: ContentStore,
        drivers: Drivers,
        marks: Marks,
        details: DetailsCache,
        collector: Collector,
        tending: Tending,
        ids: TreeIds,
    ) -> None:
        self._root = root
        self._database = database
        self._content = content
        self._drivers = drivers
        self._marks = marks
        self._details = details
        self._collector = collector
        self._tending = tending
        self._ids = ids

    def is_needed(self) -> bool:
        return is_lost(self._root)

    async def rebuild(self) -> None:
        """All of it, in one transaction. Raises CorralError, OSError."""
        blobs = await run_blocking(self._look_at_blobs)
        marked = await run_blocking(self._marks.read)
        async with self._collector.changing:
            there = await run_blocking(self._trees_there)
            await write_much(self._database, lambda t: self._write(t, blobs, marked, there))
            await self._database.persist()
            await run_blocking(self._content.remove, blobs.damaged)
            known = self._database.read_sync(lambda s: {row[0] for row in s.execute("SELECT id FROM snapshots")})
            self._tending.remove(tree for tree in there if tree not in known and not self._ids.is_own(tree))
            await self._marks.follow(keeping=False)
            await run_blocking((self._root / LOST).unlink, missing_ok=True)
        log.info("images.database_rebuilt", blobs=len(blobs.sizes), trees=len(known))

    # Looking

    def _look_at_blobs(self) -> _Blobs:
        found = _Blobs()
        for digest in self._content.stored():
            path = self._content.path(digest)
            if not is_proven(path, digest):
                found.damaged.append(digest)
                continue
            size = path.stat().st_size
            found.sizes[digest] = size
            if size <= MAX_MANIFEST_BYTES and (document := self._document(digest)) is not None:
                found.documents[digest] = document
        for digest in self._content.recipes():
            facts = recipe.read_facts(self._content.recipe(digest))
            blob_bytes, chain_id = facts.get("size_bytes"), facts.get("chain_id")
            if isinstance(blob_bytes, int) and isinstance(chain_id, str):
                found.sizes[digest], found.recipes[digest] = blob_bytes, chain_id
        return found

    def _document(self, digest: Digest) -> Manifest | Index | None:
        data = self._content.read(digest, max_bytes=MAX_MANIFEST_BYTES)
        if not data.lstrip().startswith(b"{"):
            return None
        try:
            return parse_manifest_or_index(data, f"manifest {digest}")
        except CorralError:  # a config, or anything else
            return None

    def _trees_there(self) -> Mapping[TreeId, Snapshotter]:
        return {tree: driver for driver in self._drivers for tree in driver.trees()}

    # Writing

    def _write(
        self, transaction: Transaction, blobs: _Blobs, marked: Marked, there: Mapping[TreeId, Snapshotter]
    ) -> None:
        self._write_trees(transaction, marked.trees, there)
        made = self._makeable(transaction, blobs)
        keep_until_ns = time.time_ns() + GRACE_NS
        for digest, size in blobs.sizes.items():
            insert_blob(transaction, digest, size, keep_until_ns=keep_until_ns)
        for parent, child in blobs.edges:
            transaction.execute("INSERT OR IGNORE INTO blob_edges (parent, child) VALUES (?, ?)", (parent, child))
        for digest, tree in made.items():
            recipes.insert(transaction, digest, tree, self._content.recipe(digest).stat().st_size)
        # Among the names are those of images that have none: what is not there is nobody's.
        for record in self._nameless(transaction, blobs) if marked.names is None else marked.names:
            self._write_image(transaction, blobs, record)

    def _makeable(self, transaction: Transaction, blobs: _Blobs) -> Mapping[Digest, TreeId]:
        """Blobs that were not kept, with the layers that they are made of; those that have lost theirs are no blobs."""
        found = {}
        for digest, chain_id in blobs.recipes.items():
            layer = trees.layer(transaction, chain_id, self._drivers.default.name)
            if layer is not None:
                found[digest] = layer.id
            elif not self._content.path(digest).exists():
                del blobs.sizes[digest]
        return found

    def _write_trees(
        self,
        transaction: Transaction,
        marked: Mapping[TreeId, TreeRecord],
        there: Mapping[TreeId, Snapshotter],
    ) -> None:
        """From the bottom upwards."""
        written: dict[TreeId, TreeRecord] = {}
        for record in _bottom_first(marked):
            if record.parent is not None and record.parent not in written:
                continue
            if not _is_as_marked(record, there):
                continue
            marked_id = record.id
            below = None if record.parent is None else written[record.parent]
            record = replace(
                record, parent=None if below is None else below.id, chain=() if below is None else below.chain_with_self
            )
            try:
                trees.insert(transaction, record)
            except Duplicate:  # made again since: what lies on a layer can as well lie on its like
                again = trees.layer(transaction, record.key, record.driver)
                if again is None or record.namespace != SHARED:
                    continue
                record = again
            written[marked_id] = record

    def _write_image(self, transaction: Transaction, blobs: _Blobs, record: ImageRecord) -> None:
        try:
            if not blobs.is_whole(record.manifest.digest) or record.target.digest not in blobs.sizes:
                return
            details = self._details.get(record.manifest)
        except CorralError as e:
            log.warning("images.image_not_rebuilt", image=record.name or record.image_id, error=str(e))
            return
        taken = "SELECT 1 FROM images WHERE namespace = ? AND name = ? AND name != ''"
        if transaction.one(taken, (record.namespace, record.name)) is not None:
            return
        here = details.chain and trees.layer(transaction, details.chain_id, self._drivers.default.name) is not None
        catalog.set_name(transaction, replace(record, chain_id=details.chain_id if here else ""))
        reached = blobs.reached(record.target.digest)
        holders.record(transaction, record.namespace, reached)
        for digest in reached:  # the image keeps it: its time of grace is over
            transaction.execute("UPDATE blobs SET keep_until_ns = 0 WHERE digest = ?", (digest,))
        facts = {"id": record.image_id}
        transaction.journal("image.recovered", record.name or record.image_id, facts, namespace=record.namespace)

    def _nameless(self, transaction: Transaction, blobs: _Blobs) -> Iterable[ImageRecord]:
        """Images that no name leads to, and no index."""
        rows = transaction.execute(
            "WITH RECURSIVE reached(digest) AS ("
            "SELECT target_digest FROM images UNION SELECT manifest_digest FROM images"
            " UNION SELECT child FROM blob_edges JOIN reached ON parent = digest) SELECT digest FROM reached"
        )
        reached = {row[0] for row in rows} | {child for _, child in blobs.edges}
        for digest in sorted(blobs.documents.keys() - reached):
            manifest = self._manifest_of(blobs, digest)
            if manifest is not None and blobs.is_whole(manifest):
                document = blobs.documents[manifest]
                assert isinstance(document, Manifest)
                yield ImageRecord(
                    namespace=DEFAULT_NAMESPACE,
                    name="",
                    image_id=document.config.digest,
                    target=blobs.descriptor(digest),
                    manifest=blobs.descriptor(manifest),
                    chain_id="",
                    updated_ns=catalog.now_ns(),
                )

    def _manifest_of(self, blobs: _Blobs, digest: Digest) -> Digest | None:
        document = blobs.documents.get(digest)
        if not isinstance(document, Index):
            return digest if document is not None else None
        chosen = choose(document.manifests, host_platform())
        return None if chosen is None or chosen.digest not in blobs.documents else chosen.digest


def _bottom_first(marked: Mapping[TreeId, TreeRecord]) -> Iterable[TreeRecord]:
    """Each after the one that it lies on; their numbers say nothing about that."""
    above: dict[TreeId | None, list[TreeRecord]] = {}
    for record in marked.values():
        above.setdefault(record.parent, []).append(record)
    todo = above.pop(None, [])
    while todo:
        record = todo.pop()
        yield record
        todo += above.pop(record.id, [])


def _is_as_marked(record: TreeRecord, there: Mapping[TreeId, Snapshotter]) -> bool:
    driver = there.get(record.id)
    if record.kind is Kind.VIEW:  # one of layers may have no tree of its own
        return driver is None or driver.name == record.driver
    if driver is None or driver.name != record.driver:
        return False
    return record.kind is Kind.ACTIVE or driver.is_layer(record.id)
