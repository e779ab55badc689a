"""corral.images.v1.Images."""
# ruff: noqa: N802 (methods are named as the RPCs are)

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from corral.api.images.v1 import images_pb2 as pb
from corral.api.images.v1 import images_pb2_grpc
from corral.api.types.v1 import types_pb2 as types
from corral.images import wire
from corral.images.catalog import ImageRecord
from corral.images.images import Images
from corral.images.importer import Format, Importer, ImportOptions
from corral.images.progress import Step
from corral.images.reference import parse_reference
from corral.images.servicers.call import lease_of
from corral.images.servicers.inflow import Inflow
from corral.rpc.context import current_namespace
from corral.rpc.errors import InvalidArgument, Unimplemented
from corral.rpc.events import stream_events
from corral.store import Database

type Context = grpc.aio.ServicerContext[Any, Any]

PROGRESS_EVERY_S = 0.1


class ImagesServicer(images_pb2_grpc.ImagesServicer):
    """See the proto."""

    def __init__(self, images: Images, importer: Importer, database: Database) -> None:
        self._images = images
        self._importer = importer
        self._database = database

    async def Import(
        self, request_iterator: AsyncIterator[pb.ImportRequest], context: Context
    ) -> AsyncIterator[pb.ImportResponse]:
        async with Inflow(request_iterator) as requests:
            first = await anext(requests, None)
            if first is None or first.WhichOneof("part") != "header":
                raise InvalidArgument("the first message of an import is its header")
            options = import_options(first.header, current_namespace(), lease_of(context))
            progress = ProgressQueue()
            work = asyncio.ensure_future(self._importer.run(options, _data(requests), progress.report))
            try:
                async for item in progress.until_done(work):
                    yield pb.ImportResponse(progress=item)
                records = await work
            finally:
                if not work.done():
                    work.cancel()
                    await asyncio.wait((work,))
        yield pb.ImportResponse(result=pb.ImportResult(images=[self._message(record) for record in records]))

    async def Export(self, request: pb.ExportRequest, context: Context) -> AsyncIterator[pb.ExportResponse]:
        async for response in NotYet[pb.ExportResponse](
            "corral cannot export images yet; the archive they came from still holds them"
        ):
            yield response

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[pb.PullResponse]:
        async for response in NotYet[pb.PullResponse](
            "corral cannot pull from registries yet: fetch the image with `skopeo copy docker://NAME oci-archive:FILE`"
            " and run `corral image import FILE`"
        ):
            yield response

    async def Push(self, request: pb.PushRequest, context: Context) -> AsyncIterator[pb.PushResponse]:
        async for response in NotYet[pb.PushResponse]("corral cannot push to registries yet"):
            yield response

    async def Get(self, request: pb.GetImageRequest, context: Context) -> pb.Image:
        return self._message(self._images.find(current_namespace(), request.name))

    async def List(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        views = await self._images.view_all(current_namespace(), request.pattern)
        return pb.ListImagesResponse(images=[wire.from_image(view) for view in views])

    async def Tag(self, request: pb.TagImageRequest, context: Context) -> pb.Image:
        return self._message(await self._images.tag(current_namespace(), request.source, request.target))

    async def Remove(self, request: pb.RemoveImageRequest, context: Context) -> pb.RemoveImageResponse:
        removed = await self._images.remove(current_namespace(), request.name, force=request.force)
        deleted, reclaimed = wire.from_collected(removed.collected)
        return pb.RemoveImageResponse(untagged=removed.untagged, deleted=deleted, reclaimed_bytes=reclaimed)

    async def Prune(self, request: pb.PruneRequest, context: Context) -> pb.PruneResponse:
        removed = await self._images.prune(current_namespace(), everything=request.all)
        deleted, reclaimed = wire.from_collected(removed.collected)
        return pb.PruneResponse(untagged=removed.untagged, deleted=deleted, reclaimed_bytes=reclaimed)

    async def Events(self, request: types.EventsRequest, context: Context) -> AsyncIterator[types.EventsResponse]:
        async for response in stream_events(self._database.journal, request):
            yield response

    def _message(self, record: ImageRecord) -> pb.Image:
        return wire.from_image(self._images.view(record))


def import_options(header: pb.ImportHeader, namespace: str, lease: str) -> ImportOptions:
    """Raises InvalidArgument."""
    return ImportOptions(
        namespace=namespace,
        format=Format(header.format),
        name=parse_reference(header.name) if header.name else None,
        total_bytes=header.total_bytes,
        config=wire.to_config(header.config),
        platform=wire.to_platform(header.platform),
        unpack=not header.no_unpack,
        lease=lease,
    )


async def _data(requests: AsyncIterator[pb.ImportRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "data":
            raise InvalidArgument("an import has one header, then only data")
        yield request.data


class NotYet[T](AsyncIterator[T]):
    """A stream that only says that corral cannot do this yet."""

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence

    async def __anext__(self) -> T:
        raise Unimplemented(self._sentence)


class ProgressQueue:
    """Reports on their way to a client, the latest of each item and step, a few times a second."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, Step], types.Progress] = {}
        self._changed = asyncio.Event()

    def report(self, item: str, step: Step, done_bytes: int, total_bytes: int) -> None:
        """On the event loop."""
        message = types.Progress(
            item=item, step=types.Progress.Step.ValueType(step), done_bytes=done_bytes, total_bytes=total_bytes
        )
        self._waiting[item, step] = message
        self._changed.set()

    async def until_done(self, work: asyncio.Future[Any]) -> AsyncIterator[types.Progress]:
        """What is reported until `work` ends, and the last of it then."""
        while not work.done():
            waiting = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            self._changed.clear()
            for message in self._take():
                yield message
            if not work.done():
                await asyncio.wait((work,), timeout=PROGRESS_EVERY_S)
        for message in self._take():
            yield message

    def _take(self) -> list[types.Progress]:
        taken = list(self._waiting.values())
        self._waiting.clear()
        return taken
