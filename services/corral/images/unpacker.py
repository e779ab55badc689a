"""Layers out of blobs: staged and filled side by side, then made visible all at once.

    missing(details) -> unpack: stage, worker applies, driver builds in order from the bottom -> sync -> commit

Nothing of it is in the database before `commit`; a crash before leaves staged trees without a row, which the next start
removes.
"""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from corral.images import trees
from corral.images.content import ContentStore
from corral.images.details import Details
from corral.images.digest import Digest
from corral.images.errors import explained
from corral.images.layers.errors import BadLayer
from corral.images.progress import Report, Step
from corral.images.snapshotter import NOTHING_MISSING, Missing, Snapshotter, TreeId
from corral.images.store import SHARED, uninterrupted
from corral.images.trees import Kind, TreeRecord
from corral.images.workers import Workers
from corral.kernel.syncfs import syncfs
from corral.rpc.blocking import run_blocking, run_long
from corral.rpc.errors import InvalidArgument
from corral.store import Database, Snapshot, Transaction, failpoint

# Where a blob lies, once it is there: a layer is unpacked while others are still on their way.
type BlobSource = Callable[[Digest], Awaitable[Path]]
type Blob = Callable[[], Awaitable[Path]]


@dataclass(slots=True)
class Staged:
    """A layer that is unpacked but not committed."""

    tree: TreeId
    path: Path
    chain_id: Digest
    size_bytes: int = 0
    inodes: int = 0
    diff_id: str = ""
    missing: Missing = NOTHING_MISSING


class TreeIds:
    """Numbers for trees, never given out twice as long as anything of the old one is on disk."""

    def __init__(self) -> None:
        self.start_after(0)

    def start_after(self, highest: int) -> None:
        self._first = self._newest = highest
        self._next = itertools.count(highest + 1)

    def new(self) -> TreeId:
        self._newest = next(self._next)
        return TreeId(self._newest)

    def is_own(self, tree: TreeId) -> bool:
        """Whether this process gave it out: somebody here knows what becomes of it."""
        return self._first < tree <= self._newest


class Unpacker:
    """Makes layers of one driver."""

    def __init__(
        self, database: Database, content: ContentStore, driver: Snapshotter, workers: Workers, ids: TreeIds
    ) -> None:
        self._database = database
        self._content = content
        self._driver = driver
        self._workers = workers
        self._ids = ids

    @asynccontextmanager
    async def unpacked(self, details: Details, blob_path: BlobSource, report: Report) -> AsyncIterator[list[Staged]]:
        """The layers of an image that are not here yet, unpacked. What the block leaves in the list is removed."""
        self._check_depth(details)
        here = self._database.read_sync(lambda s: trees.layers(s, details.chain, self._driver.name))
        for diff_id, chain_id in zip(details.config.diff_ids, details.chain, strict=True):
            if chain_id in here:
                report(diff_id, Step.EXISTS, 0, 0)
        staged: list[Staged] = []
        try:
            await self._unpack_missing(details, here, blob_path, report, staged)
            yield staged
        finally:
            await self.discard(staged)

    def _check_depth(self, details: Details) -> None:
        if len(details.chain) > self._driver.max_layers:
            raise InvalidArgument(
                f"the image has {len(details.chain)} layers; {self._driver.name} stacks only {self._driver.max_layers}"
            )

    async def discard(self, staged: Sequence[Staged]) -> None:
        """Remove what was staged and not committed."""
        if staged:
            await asyncio.shield(run_blocking(self._remove, [layer.tree for layer in staged]))

    async def unpack_one(self, blob: Path, what: str, report: Report) -> Staged:
        """A bottom layer whose diff id is not known yet. The caller commits or discards it."""
        layer = await self._stage(Digest(""))
        try:
            await self._apply(layer, partial(ready, blob), what, diff_id="", bottom=True, report=report)
        except BaseException:
            await asyncio.shield(run_blocking(self._driver.remove, layer.tree))
            raise
        return layer

    async def restore(self, layer: TreeRecord, blob: Path, diff_id: Digest) -> None:
        """Unpack a committed layer again, whose tree is gone though others lie on it. Raises CorralError."""
        await run_blocking(self._driver.remove, layer.id)
        try:
            staged = Staged(layer.id, await run_blocking(self._driver.stage, layer.id), Digest(layer.key))
        except OSError as e:
            raise explained(e, "cannot unpack a layer") from e
        bottom = not layer.chain
        await self._apply(staged, partial(ready, blob), diff_id, diff_id=diff_id, bottom=bottom, report=lambda *_: None)
        try:
            await uninterrupted(run_long(self._driver.build, layer.id, layer.chain, staged.missing))
        except (OSError, BadLayer) as e:
            raise explained(e, f"cannot unpack layer {diff_id}") from e
        await run_blocking(self.sync, [staged])
        await uninterrupted(run_blocking(self.place, [staged]))

    async def _unpack_missing(
        self,
        details: Details,
        here: dict[str, TreeRecord],
        blob_path: BlobSource,
        report: Report,
        staged: list[Staged],
    ) -> None:
        jobs: list[Callable[[], Coroutine[None, None, None]]] = []
        for i, (chain_id, diff_id, descriptor) in enumerate(details.layers):
            blob = partial(blob_path, descriptor.digest)
            if chain_id in here:
                if not self._database.read_sync(partial(_unpacks_to, blob=descriptor.digest, diff_id=diff_id)):
                    jobs.append(partial(self._measure, blob, diff_id))
            else:
                layer = await self._stage(chain_id)
                staged.append(layer)
                job = partial(self._apply, layer, blob, diff_id, diff_id=diff_id, bottom=i == 0, report=report)
                jobs.append(job)
        async with _together() as group:
            group += [asyncio.ensure_future(job()) for job in jobs]
        await self._build(details, here, staged)
        await run_blocking(self.sync, staged)
        failpoint("images.unpack.after_sync")

    async def _measure(self, blob: Blob, diff_id: Digest) -> None:
        """That the layer is here does not make what came with this image the same."""
        path = await blob()
        try:
            async with self._content.whole(path):
                await self._workers.run({"op": "measure", "blob": str(path), "diff_id": diff_id}, lambda _done: None)
        except (OSError, BadLayer) as e:
            raise explained(e, f"cannot take layer {diff_id}") from e

    async def _stage(self, chain_id: Digest) -> Staged:
        tree = self._ids.new()
        try:
            path = await run_blocking(self._driver.stage, tree)
        except OSError as e:
            raise explained(e, "cannot unpack a layer") from e
        return Staged(tree, path, chain_id)

    async def _apply(self, layer: Staged, blob: Blob, what: str, *, diff_id: str, bottom: bool, report: Report) -> None:
        doing = f"cannot unpack layer {what}"
        path = await blob()
        try:
            async with self._content.whole(path):
                total = await run_blocking(lambda: path.stat().st_size)
                job = {
                    "op": "apply",
                    "blob": str(path),
                    "target": str(layer.path),
                    "form": self._driver.form,
                    "bottom": bottom,
                    "diff_id": diff_id,
                }
                answer = await self._workers.run(job, lambda done: report(what, Step.UNPACK, done, total))
        except (OSError, BadLayer) as e:
            raise explained(e, doing) from e
        layer.size_bytes, layer.inodes, layer.diff_id = answer["size_bytes"], answer["inodes"], answer["diff_id"]
        layer.missing = Missing(answer["implicit"], answer["links"])
        report(what, Step.DONE, total, total)

    async def _build(self, details: Details, here: dict[str, TreeRecord], staged: Sequence[Staged]) -> None:
        """In order from the bottom, since a layer may take from what was finished below it."""
        ids = {layer.chain_id: layer.tree for layer in staged}
        ids |= {Digest(chain_id): record.id for chain_id, record in here.items()}
        for layer in staged:
            depth = details.chain.index(layer.chain_id)
            below = [ids[chain_id] for chain_id in reversed(details.chain[:depth])]
            try:
                # Whoever is cancelled meanwhile removes the tree next: nobody may be at work in it then.
                layer.size_bytes += await uninterrupted(run_long(self._driver.build, layer.tree, below, layer.missing))
            except (OSError, BadLayer) as e:
                raise explained(e, f"cannot unpack layer {layer.diff_id}") from e

    def sync(self, staged: Sequence[Staged]) -> None:
        """One flush for all: they lie on one file system."""
        if not staged:
            return
        fd = os.open(staged[0].path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syncfs(fd)
        except OSError as e:
            raise explained(e, "cannot store the image's layers") from e
        finally:
            os.close(fd)

    def _remove(self, left: Sequence[TreeId]) -> None:
        for tree in left:
            self._driver.remove(tree)

    def chain_id_if_here(self, snapshot: Snapshot, details: Details) -> str:
        """The image's chain id if all its layers are committed, and its own blobs are known to be those; else empty."""
        here = details.chain and trees.layer(snapshot, details.chain_id, self._driver.name) is not None
        proven = all(_unpacks_to(snapshot, blob.digest, diff_id) for _, diff_id, blob in details.layers)
        return details.chain_id if here and proven else ""

    def place(self, layers: Sequence[Staged]) -> None:
        """Move staged trees to where layers are. Blocking; their rows follow at once."""
        if layers:
            self._driver.commit([layer.tree for layer in layers])

    def wanted(self, snapshot: Snapshot, layers: Sequence[Staged]) -> list[Staged]:
        """Those that nobody else has committed in the meantime."""
        return [layer for layer in layers if trees.layer(snapshot, layer.chain_id, self._driver.name) is None]

    def insert(self, transaction: Transaction, details: Details, placed: Sequence[Staged]) -> None:
        """The rows of what was placed. Raises Referenced if a layer below went away, which pinning prevents."""
        for _, diff_id, descriptor in details.layers:
            transaction.execute(
                "INSERT OR IGNORE INTO diff_ids (digest, diff_id) VALUES (?, ?)", (descriptor.digest, diff_id)
            )
        by_chain_id = {layer.chain_id: layer for layer in placed}
        parent: TreeRecord | None = None
        for chain_id in details.chain:
            record = trees.layer(transaction, chain_id, self._driver.name)
            if record is None:
                layer = by_chain_id[chain_id]
                record = trees.new_record(
                    layer.tree,
                    namespace=SHARED,
                    key=chain_id,
                    kind=Kind.COMMITTED,
                    parent=parent,
                    driver=self._driver.name,
                    size_bytes=layer.size_bytes,
                    inodes=layer.inodes,
                )
                trees.insert(transaction, record)
            parent = record


def _unpacks_to(snapshot: Snapshot, blob: Digest, diff_id: Digest) -> bool:
    """Whether the blob is known to unpack to that: being it, or from an earlier time."""
    if blob == diff_id:
        return True
    row = snapshot.one("SELECT diff_id FROM diff_ids WHERE digest = ?", (blob,))
    return row is not None and row[0] == diff_id


async def ready(path: Path) -> Path:
    """A blob that is there already."""
    return path


@asynccontextmanager
async def _together() -> AsyncIterator[list[asyncio.Future[None]]]:
    """Wait for all the tasks that the block starts; when one fails the others are cancelled, and its error raised."""
    group: list[asyncio.Future[None]] = []
    try:
        yield group
        await asyncio.gather(*group)
    finally:
        for task in group:
            task.cancel()
        await asyncio.gather(*group, return_exceptions=True)
