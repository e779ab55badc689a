"""The images leaf in the test's own process, with a client of every service of it."""

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from corral.api.images.v1 import images_pb2 as pb
from corral.api.images.v1.images_pb2_grpc import ContentStub, ImagesStub, LeasesStub, SnapshotsStub
from corral.images.config import ImagesConfig
from corral.images.service import ImagesService
from corral.rpc.address import parse_address
from corral.rpc.channel import open_channel
from corral.rpc.server import hosted

CHUNK = 256 * 1024


@dataclass(frozen=True, slots=True)
class ImagesLeaf:
    """What tests do goes over the wire; `own` is for looking inside, if it runs in this process."""

    channel: grpc.aio.Channel
    root: Path
    own: ImagesService | None = None

    @property
    def service(self) -> ImagesService:
        assert self.own is not None
        return self.own

    @property
    def images(self) -> ImagesStub:
        return ImagesStub(self.channel)

    @property
    def content(self) -> ContentStub:
        return ContentStub(self.channel)

    @property
    def snapshots(self) -> SnapshotsStub:
        return SnapshotsStub(self.channel)

    @property
    def leases(self) -> LeasesStub:
        return LeasesStub(self.channel)

    async def load(
        self, archive: Path | bytes, *, metadata: Sequence[tuple[str, str]] = (), **header: object
    ) -> list[pb.Image]:
        """Import an archive; returns its images."""
        [*_, last] = await self.load_all(archive, metadata=metadata, **header)
        return list(last.result.images)

    async def load_all(
        self, archive: Path | bytes, *, metadata: Sequence[tuple[str, str]] = (), **header: object
    ) -> list[pb.ImportResponse]:
        """Import an archive; returns everything that was said meanwhile."""
        requests = import_requests(archive, **header)
        return [response async for response in self.images.Import(requests, metadata=tuple(metadata))]

    async def pull(self, name: str, **request: object) -> pb.Image:
        """Pull an image; returns it."""
        [*_, last] = await self.pull_all(name, **request)
        return last.image

    async def pull_all(self, name: str, **request: object) -> list[pb.PullResponse]:
        """Pull an image; returns everything that was said meanwhile."""
        return [response async for response in self.images.Pull(pb.PullRequest(name=name, **request))]  # type: ignore[arg-type]

    async def push(self, name: str, destination: str = "", **request: object) -> str:
        """Push an image; returns the digest that its name there has."""
        [*_, last] = await self.push_all(name, destination, **request)
        return last.pushed.digest

    async def push_all(self, name: str, destination: str = "", **request: object) -> list[pb.PushResponse]:
        """Push an image; returns everything that was said meanwhile."""
        wanted = pb.PushRequest(name=name, destination=destination, **request)  # type: ignore[arg-type]
        return [response async for response in self.images.Push(wanted)]

    async def prepare(
        self, key: str, *, image: str = "", parent: str = "", lease: str = ""
    ) -> pb.PrepareSnapshotResponse:
        return await self.snapshots.Prepare(_prepare_request(key, image, parent), metadata=lease_metadata(lease))

    async def view(self, key: str, *, image: str = "", parent: str = "") -> pb.PrepareSnapshotResponse:
        return await self.snapshots.View(_prepare_request(key, image, parent))

    async def names(self) -> list[str]:
        """Familiar names of all images."""
        found = await self.images.List(pb.ListImagesRequest())
        return [image.familiar_name for image in found.images]

    async def settled(self) -> None:
        """Wait for what goes on in the background."""
        await self.service._tending.done()

    def disk(self) -> set[str]:
        """Blobs, layers, writable trees and everything unfinished that is on disk, database and lock aside."""
        found = set()
        for above in ("blobs/sha256", "ingest", "partial", "overlay/tmp", "overlay/l", "overlay/s"):
            found |= {f"{above}/{path.name}" for path in (self.root / above).iterdir()}
        return found


def _prepare_request(key: str, image: str, parent: str) -> pb.PrepareSnapshotRequest:
    request = pb.PrepareSnapshotRequest(key=key)
    if image:
        request.image = image
    if parent:
        request.parent_snapshot = parent
    return request


def lease_metadata(lease: str) -> tuple[tuple[str, str], ...]:
    return (("corral-lease", lease),) if lease else ()


def import_requests(archive: Path | bytes, **header: object) -> AsyncIterator[pb.ImportRequest]:
    """The messages of an import, as a client sends them."""
    return _import_requests(archive if isinstance(archive, bytes) else archive.read_bytes(), header)


async def _import_requests(data: bytes, header: dict[str, object]) -> AsyncIterator[pb.ImportRequest]:
    yield pb.ImportRequest(header=pb.ImportHeader(total_bytes=len(data), **header))  # type: ignore[arg-type]
    for start in range(0, len(data), CHUNK):
        yield pb.ImportRequest(data=data[start : start + CHUNK])


@asynccontextmanager
async def images_leaf(root: Path, **settings: object) -> AsyncIterator[ImagesLeaf]:
    """Serve the leaf from `root`, which outlives the block: start it there again, and it recovers."""
    config = ImagesConfig(root=root, state=root / "run", **settings)  # type: ignore[arg-type]
    service = ImagesService(config)
    with tempfile.TemporaryDirectory(prefix="corral-im-") as directory:
        async with hosted([service], parse_address(f"unix://{directory}/s")) as address:
            channel = open_channel(str(address))
            try:
                yield ImagesLeaf(channel, root, service)
            finally:
                await channel.close()
