"""Import: an archive that streams in becomes images, or nothing.

    take in      a thread writes the archive's files to a directory of their own, and hashes them
    understand   manifests and configs are parsed and held against the files
    unpack       worker processes fill staged trees
    admit        files and trees are renamed to their places, then one transaction makes the images visible

A failure or a crash anywhere before the end leaves nothing: the directory and the staged trees go at once, or at the
next start.
"""

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from corral.images import leases
from corral.images.admission import Admission, Admitted
from corral.images.archives.chunks import Cancelled, ChunkPipe
from corral.images.archives.docker import Store, read_docker_archive
from corral.images.archives.found import FoundImage, blob_paths
from corral.images.archives.intake import Intake, StoredFile, looks_like_archive, take_in, take_whole
from corral.images.archives.oci import INDEX, read_oci_archive
from corral.images.archives.rootfs import make_rootfs_image
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.content import ContentStore, Ingest
from corral.images.digest import Digest
from corral.images.errors import explained
from corral.images.layers.errors import BadLayer
from corral.images.model import ImageConfig, Platform
from corral.images.platforms import host_platform
from corral.images.progress import Report, Step
from corral.images.reference import Reference
from corral.images.unpacker import Staged, Unpacker
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import InvalidArgument
from corral.store import Database, failpoint

ARCHIVE = "archive"
MAX_IMPORTS = 16


class Format(IntEnum):
    """Numbers as on the wire."""

    UNSPECIFIED = 0
    DOCKER_ARCHIVE = 1
    OCI_ARCHIVE = 2
    ROOTFS = 3


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the user asked for."""

    namespace: str
    format: Format = Format.UNSPECIFIED
    name: Reference | None = None
    total_bytes: int = 0
    config: ImageConfig = field(default_factory=ImageConfig)
    platform: Platform = field(default_factory=host_platform)
    unpack: bool = True
    lease: str = ""


@dataclass(slots=True)
class _Taken:
    """The archive, written down: its files, or the one layer it is."""

    intake: Intake | None
    layer: StoredFile | None


class Importer:
    """See the module."""

    def __init__(
        self,
        database: Database,
        content: ContentStore,
        unpacker: Unpacker,
        collector: Collector,
        admission: Admission,
        *,
        max_bytes: int,
    ) -> None:
        self._database = database
        self._content = content
        self._unpacker = unpacker
        self._collector = collector
        self._admission = admission
        self._max_bytes = max_bytes
        # Threads that may wait for a client for as long as it likes; so not those that everybody shares.
        self._threads = ThreadPoolExecutor(MAX_IMPORTS, thread_name_prefix="import")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, options: ImportOptions, source: AsyncIterator[bytes], report: Report) -> list[ImageRecord]:
        """Import what `source` yields. Raises InvalidArgument, NotFound, ResourceExhausted."""
        if options.lease:
            self._database.read_sync(lambda s: leases.check_alive(s, options.namespace, options.lease))
        try:
            directory = await run_blocking(self._content.make_ingest_directory)
        except OSError as e:
            raise explained(e, "cannot store the archive") from e
        try:
            return await self._run(options, source, report, directory)
        except BadLayer as e:
            raise explained(e, "cannot import the archive") from e
        except OSError as e:
            raise explained(e, "cannot store the archive") from e
        finally:
            await asyncio.shield(run_blocking(shutil.rmtree, directory, True))

    async def _run(
        self, options: ImportOptions, source: AsyncIterator[bytes], report: Report, directory: Path
    ) -> list[ImageRecord]:
        taken = await self._take(options, source, report, directory)
        failpoint("images.import.after_intake")
        async with AsyncExitStack() as stack:
            if taken.layer is not None:
                images, staged = await self._rootfs(options, taken.layer, report, directory, stack)
            else:
                assert taken.intake is not None
                images = await run_blocking(_understand, options, taken.intake, directory)
                staged = []
            await stack.enter_async_context(self._collector.pinned(_everything_of(images)))
            how = Admitted(options.namespace, "image.imported", options.lease, options.name, options.unpack)
            self._admission.check(how, images)
            paths = blob_paths(images)

            async def path_of(digest: Digest) -> Path:
                return paths[digest]

            if options.unpack and taken.layer is None:
                for image in images:
                    unpacked = self._unpacker.unpacked(image.details, path_of, report)
                    staged.append(await stack.enter_async_context(unpacked))
            return await self._admission.admit(how, images, staged)

    async def _take(
        self, options: ImportOptions, source: AsyncIterator[bytes], report: Report, directory: Path
    ) -> _Taken:
        """Feed a thread that writes the archive down; whichever side ends first, the other is waited for."""
        pipe = ChunkPipe()
        reading = asyncio.get_running_loop().run_in_executor(
            self._threads, _read_archive, options, pipe, directory, self._max_bytes
        )
        feeding = asyncio.ensure_future(pipe.feed(_counted(source, options.total_bytes, report)))
        try:
            await asyncio.wait((reading, feeding), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await feeding
            return await reading
        except Cancelled as e:
            raise InvalidArgument("the transfer of the archive was broken off: nothing was imported") from e
        finally:
            feeding.cancel()
            pipe.abort()
            await asyncio.wait((reading, feeding))
            if not reading.cancelled():
                reading.exception()  # told already, or the client that would be told has gone

    async def _rootfs(
        self, options: ImportOptions, layer: StoredFile, report: Report, directory: Path, stack: AsyncExitStack
    ) -> tuple[list[FoundImage], list[list[Staged]]]:
        """The one layer tells its diff id by being unpacked."""
        name = options.name
        if name is None:
            raise InvalidArgument("this is a plain root file system: give the image a name with --as NAME:TAG")
        staged = await self._unpacker.unpack_one(layer.path, str(name), report)
        staged.chain_id = Digest(staged.diff_id)
        layers = [staged]
        stack.push_async_callback(self._unpacker.discard, layers)
        await run_blocking(self._unpacker.sync, layers)
        image = await run_blocking(
            make_rootfs_image, name, layer, staged.chain_id, options.config, options.platform, _store_in(directory)
        )
        return [image], [layers] if options.unpack else []


async def _counted(source: AsyncIterator[bytes], total: int, report: Report) -> AsyncIterator[bytes]:
    done = 0
    async for chunk in source:
        done += len(chunk)
        report(ARCHIVE, Step.TRANSFER, done, total)
        yield chunk


def _read_archive(options: ImportOptions, pipe: ChunkPipe, directory: Path, max_bytes: int) -> _Taken:
    """Runs in a thread of its own, at the pace of the client."""
    chunks = pipe.read()
    try:
        if options.format is Format.UNSPECIFIED:
            is_archive, chunks = looks_like_archive(chunks)
        else:
            is_archive = options.format is not Format.ROOTFS
        if is_archive:
            return _Taken(take_in(chunks, directory, max_bytes=max_bytes), None)
        if options.name is None:
            raise InvalidArgument(
                "this is a plain root file system, not an archive of images: give the image a name with --as NAME:TAG",
                reason="NAME_NEEDED",
            )
        return _Taken(None, take_whole(chunks, directory / "layer", max_bytes=max_bytes))
    finally:
        pipe.close_reader()


def _understand(options: ImportOptions, intake: Intake, directory: Path) -> list[FoundImage]:
    is_oci = options.format is Format.OCI_ARCHIVE
    if options.format is Format.UNSPECIFIED:
        is_oci = intake.find(INDEX) is not None
    if is_oci:
        images = read_oci_archive(intake, options.platform)
    else:
        images = read_docker_archive(intake, _store_in(directory))
    if options.name is not None and len(images) > 1:
        raise InvalidArgument(
            f"the archive holds {len(images)} images, which cannot all be {options.name.familiar}: leave out the name"
        )
    return images


def _store_in(directory: Path) -> Store:
    """Writes documents that corral makes itself beside the archive's files."""

    def store(data: bytes) -> StoredFile:
        ingest = Ingest(directory / f"made-{secrets.token_hex(4)}")
        try:
            ingest.write(data)
        finally:
            ingest.close()
        return StoredFile(ingest.path, ingest.digest, ingest.size_bytes)

    return store


def _everything_of(images: Sequence[FoundImage]) -> list[str]:
    return [name for image in images for name in (*image.blobs, *image.details.chain)]
