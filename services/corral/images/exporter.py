"""Export: images become an archive that streams out, at the pace of whoever reads it.

Blobs go as they are, so an image that was built elsewhere keeps its digests. Of an index goes what is here of it, and
at least what this host, or the platform asked for, runs. Each blob is proven once more on its way: an archive with a
damaged one has no end.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from corral.images import catalog
from corral.images.archives.layout import Member, Outgoing, members
from corral.images.blobs import Blobs
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore
from corral.images.digest import Digest, digest_by, hasher, is_digest
from corral.images.holdings import Holding, Holdings, parsed
from corral.images.layers.headers import END, header, padding
from corral.images.layers.tar import Entry, Kind
from corral.images.model import Descriptor, Manifest, Platform
from corral.images.reference import Reference, parse_reference
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import InvalidArgument
from corral.store import Database

MAX_IMAGES = 1000


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the user asked for. platform None: all that is here."""

    namespace: str
    names: Sequence[str]
    for_docker: bool
    platform: Platform | None = None


class Exporter:
    """See the module."""

    def __init__(self, database: Database, content: ContentStore, blobs: Blobs, collector: Collector) -> None:
        self._database = database
        self._holdings = Holdings(database, content, for_owner=True)
        self._blobs = blobs
        self._collector = collector

    async def run(self, options: ExportOptions) -> AsyncGenerator[bytes]:
        """The archive's bytes. Raises NotFound, InvalidArgument, FailedPrecondition."""
        if not 0 < len(options.names) <= MAX_IMAGES:
            raise InvalidArgument(f"give the names of 1 to {MAX_IMAGES} images to export")
        async with AsyncExitStack() as pins:
            records = self._records(options)
            await pins.enter_async_context(self._collector.pinned([record.target.digest for _, record in records]))
            images = await run_blocking(self._images, options, records)
            files = members(images, for_docker=options.for_docker)
            await pins.enter_async_context(self._collector.pinned([file.blob for file in files if file.blob]))
            async with aclosing(self._archive(files)) as chunks:
                async for chunk in chunks:
                    yield chunk

    def _records(self, options: ExportOptions) -> Sequence[tuple[str, ImageRecord]]:
        return self._database.read_sync(
            lambda s: [(name, catalog.find(s, options.namespace, name)) for name in options.names]
        )

    def _images(self, options: ExportOptions, records: Sequence[tuple[str, ImageRecord]]) -> Sequence[Outgoing]:
        """Blocking. Each image once, with all the names that it was asked for by."""
        found: dict[Digest, Outgoing] = {}
        for text, record in records:
            image = self._image(options, text, record)
            image = found.setdefault(image.target.digest, image)
            name = _name(text, record)
            if name is not None and name not in image.names:
                image.names.append(name)
        for image in found.values():
            image.names.sort(key=str)
        return sorted(found.values(), key=lambda image: image.target.digest)

    def _image(self, options: ExportOptions, text: str, record: ImageRecord) -> Outgoing:
        target = manifest = record.target
        if options.platform is not None:
            target = manifest = self._holdings.chosen(record.target, options.platform)
        elif record.manifest.digest != record.target.digest:
            manifest = record.manifest
        needed = self._holdings.whole(manifest, text)
        holding = needed if target == manifest else self._holdings.gathered(target)
        return Outgoing(target, manifest, _manifest(manifest, needed), holding)

    async def _archive(self, files: Sequence[Member]) -> AsyncGenerator[bytes]:
        for file in files:
            yield header(Entry(file.name.encode(), Kind.FILE, 0o644, 0, 0, file.size_bytes, 0))
            if file.blob is None:
                yield file.data
            else:
                async with aclosing(self._proven(file.blob, file.size_bytes)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            yield padding(file.size_bytes)
        yield END

    async def _proven(self, digest: Digest, size_bytes: int) -> AsyncGenerator[bytes]:
        proof, done = hasher(digest), 0
        async with aclosing(self._blobs.read(digest, 0, 0)) as chunks:
            async for chunk in chunks:
                await run_blocking(proof.update, chunk)
                done += len(chunk)
                yield chunk
        if done != size_bytes or digest_by(proof) != digest:
            raise InvalidArgument(
                f"blob {digest} was changed on disk: remove its image and import or pull it again; the archive that"
                " was being written is not complete",
                reason="DIGEST_MISMATCH",
            )


def _manifest(descriptor: Descriptor, holding: Holding) -> Manifest:
    content = parsed(holding.documents[descriptor.digest])
    assert isinstance(content, Manifest), "a manifest was chosen"
    return content


def _name(text: str, record: ImageRecord) -> Reference | None:
    """An image that is asked for by its id goes without a name, as docker has it."""
    if not record.name or is_digest(text):
        return None
    try:
        return parse_reference(record.name) if str(parse_reference(text)) == record.name else None
    except InvalidArgument:
        return None
