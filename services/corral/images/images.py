"""Images: looked up, given names, unpacked when needed, removed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from corral.images import catalog, disuse, trees
from corral.images.catalog import ImageRecord
from corral.images.collector import Collected, Collector
from corral.images.content import ContentStore
from corral.images.details import Details, DetailsCache
from corral.images.digest import Digest
from corral.images.model import Config
from corral.images.offers import Offers
from corral.images.policy.gate import Gate
from corral.images.reference import parse_reference
from corral.images.snapshotter import Snapshotter
from corral.images.store import uninterrupted, write_much
from corral.images.unpacker import Staged, Unpacker
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import FailedPrecondition, InvalidArgument
from corral.store import Database, Snapshot, Transaction, failpoint


@dataclass(frozen=True, slots=True)
class ImageView:
    """All that is told about an image."""

    record: ImageRecord
    details: Details
    names: Sequence[str]
    # Bytes of each layer when unpacked, bottom first; empty if it is not.
    layer_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    untagged: Sequence[str]
    collected: Collected


@dataclass(frozen=True, slots=True)
class Only:
    """Which images may go: those made before then, with all `labels`, "KEY" or "KEY=VALUE", and none of `without`."""

    until_ns: int | None = None
    labels: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def fits(self, config: Config) -> bool:
        """An image that does not say when it was made is as old as can be."""
        until = None if self.until_ns is None else datetime.fromtimestamp(self.until_ns / 1e9, UTC)
        if until is not None and config.created is not None and config.created >= until:
            return False
        labels = {*config.config.labels, *(f"{key}={value}" for key, value in config.config.labels.items())}
        return labels.issuperset(self.labels) and labels.isdisjoint(self.without)


class Images:
    """See the module."""

    def __init__(
        self,
        database: Database,
        content: ContentStore,
        driver: Snapshotter,
        unpacker: Unpacker,
        collector: Collector,
        gate: Gate,
    ) -> None:
        self._gate = gate
        self._database = database
        self._content = content
        self._driver = driver
        self._unpacker = unpacker
        self._collector = collector
        self.details = self._details = DetailsCache(content)
        self.offers = Offers(content)

    def find(self, namespace: str, name: str) -> ImageRecord:
        """Raises NotFound, InvalidArgument."""
        return self._database.read_sync(lambda s: catalog.find(s, namespace, name))

    def view(self, record: ImageRecord) -> ImageView:
        """Everything about it. Raises NotFound if a blob of it is gone."""
        return self._database.read_sync(lambda s: self._view(s, record))

    def _view(self, snapshot: Snapshot, record: ImageRecord) -> ImageView:
        details = self._details.get(record.manifest)
        names = catalog.names_of(snapshot, record.namespace, record.image_id)
        sizes: tuple[int, ...] = ()
        if record.chain_id:
            here = trees.layers(snapshot, details.chain, self._driver.name)
            if all(chain_id in here for chain_id in details.chain):  # else it has been removed meanwhile
                sizes = tuple(here[chain_id].size_bytes for chain_id in details.chain)
        return ImageView(record, details, names, sizes)

    async def view_all(self, namespace: str, pattern: str) -> Sequence[ImageView]:
        def look_up(snapshot: Snapshot) -> Sequence[ImageView]:
            return [self._view(snapshot, record) for record in catalog.everything(snapshot, namespace, pattern)]

        return await self._database.read(look_up)

    async def tag(self, namespace: str, source: str, target: str) -> ImageRecord:
        """Raises NotFound, InvalidArgument, PermissionDenied where the policy refuses the image that name."""
        reference = parse_reference(target)
        if reference.digest is not None:
            raise InvalidArgument(f"{target!r} holds a digest: a tag is given without one")

        def write(transaction: Transaction) -> ImageRecord:
            old = catalog.find(transaction, namespace, source)
            self._gate.check_name(transaction, reference, old.target.digest, old.manifest.digest)
            record = replace(old, name=str(reference), updated_ns=catalog.now_ns())
            catalog.set_name(transaction, record)
            transaction.journal("image.tagged", record.name, {"id": record.image_id}, namespace=namespace)
            return record

        record = await self._database.write(write)
        failpoint("images.tag.after_row")
        await self._database.persist()
        return record

    async def unpacked(self, namespace: str, name: str) -> ImageRecord:
        """The image with all its layers committed; one that was only stored is unpacked now. Raises NotFound."""
        record = self.find(namespace, name)
        if record.chain_id and self._is_here(record.chain_id):
            return record
        details = await run_blocking(self._details.get, record.manifest)
        if not details.chain:
            return record
        async with self._collector.pinned((record.manifest.digest, *details.chain)):
            await self._unpack(record, details)
        return replace(record, chain_id=details.chain_id)

    def is_empty(self, record: ImageRecord) -> bool:
        """Whether the image has no layers at all. Reads its manifest, once."""
        return not self._details.get(record.manifest).chain

    def _is_here(self, chain_id: str) -> bool:
        return self._database.read_sync(lambda s: trees.layer(s, chain_id, self._driver.name)) is not None

    async def _unpack(self, record: ImageRecord, details: Details) -> None:
        async with self._unpacker.unpacked(details, self._blob_path, lambda *_: None) as staged:
            await uninterrupted(self._commit(record, details, staged))

    async def _commit(self, record: ImageRecord, details: Details, staged: list[Staged]) -> None:
        def write(transaction: Transaction) -> None:
            self._unpacker.insert(transaction, details, new)
            catalog.set_unpacked(transaction, record, details.chain_id)
            facts = {"chain_id": details.chain_id}
            transaction.journal("image.unpacked", record.image_id, facts, namespace=record.namespace)

        async with self._collector.changing:
            new = self._database.read_sync(lambda s: self._unpacker.wanted(s, staged))
            await run_blocking(self._unpacker.place, new)
            failpoint("images.unpack.before_commit")
            await write_much(self._database, write)
            staged[:] = [layer for layer in staged if layer not in new]

    async def _blob_path(self, digest: Digest) -> Path:
        return self._content.path(digest)

    async def remove(self, namespace: str, name: str, *, force: bool) -> Removed:
        """Remove a name; by id, all names of the image. Raises NotFound, FailedPrecondition."""
        records = await self._database.write(lambda t: _remove(t, namespace, name, force=force))
        failpoint("images.image_remove.after_row")
        await self._database.persist()
        return Removed([record.name for record in records if record.name], await self._collector.collect())

    async def prune(self, namespace: str, *, everything: bool, only: Only) -> Removed:
        """Remove nameless images that nothing uses, with `everything` named ones too; then all that is out of reach.

        only: what goes is not all that could; so blobs in their time of grace stay, too.
        """
        await self._collector.end_expired()
        fitting = None if only == Only() else await run_blocking(self._fitting, namespace, only)

        def remove(transaction: Transaction) -> list[ImageRecord]:
            found = disuse.unused(transaction, namespace, self._collector.is_pinned, dangling=not everything)
            records = (record for image in found for record in image.records)
            going = [record for record in records if fitting is None or record.image_id in fitting]
            catalog.remove(transaction, going)
            return going

        records = await write_much(self._database, remove)
        failpoint("images.prune.after_rows")
        collected = await self._collector.collect(grace=fitting is not None)
        await self._database.persist()
        return Removed([record.name for record in records if record.name], collected)

    def _fitting(self, namespace: str, only: Only) -> set[Digest]:
        """Ids of images."""
        records = self._database.read_sync(lambda s: catalog.everything(s, namespace))
        configs = {record.image_id: self._details.get(record.manifest).config for record in records}
        return {image_id for image_id, config in configs.items() if only.fits(config)}


def _remove(transaction: Transaction, namespace: str, name: str, *, force: bool) -> list[ImageRecord]:
    record = catalog.find(transaction, namespace, name)
    all_names = catalog.by_id(transaction, namespace, record.image_id)
    by_name = bool(record.name) and _is_name(name, record)
    if not by_name and len(all_names) > 1 and not force:
        shown = ", ".join(parse_reference(r.name).familiar for r in all_names if r.name)
        raise FailedPrecondition(
            f"image {name!r} has several names ({shown}): remove one of them, or all by force", reason="IN_USE"
        )
    going = [record] if by_name else all_names
    if not force:
        # Other names of the image keep it alive, but not the name that somebody used.
        _check_unused(transaction, name, record, last=len(going) == len(all_names))
    catalog.remove(transaction, going)
    return going


def _is_name(text: str, record: ImageRecord) -> bool:
    try:
        return str(parse_reference(text)) == record.name
    except InvalidArgument:
        return False


def _check_unused(transaction: Transaction, name: str, record: ImageRecord, *, last: bool) -> None:
    used_name = None if last else record.name
    users = trees.users_of_image(transaction, record.namespace, record.image_id, used_name)
    if users:
        more = f" and {len(users) - 1} more" if len(users) > 1 else ""
        raise FailedPrecondition(
            f"image {name!r} is used by container {users[0]}{more}: remove that first, or remove the image by force",
            reason="IN_USE",
            metadata={"image": name, "container": users[0]},
        )
