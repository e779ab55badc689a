"""corral.images.v1.Images."""
# ruff: noqa: N802 (methods are named as the RPCs are)

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc.aio

from corral.api.images.v1 import images_pb2 as pb
from corral.api.images.v1 import images_pb2_grpc
from corral.api.types.v1 import types_pb2 as types
from corral.images import wire
from corral.images.accounting import Accounts
from corral.images.catalog import ImageRecord
from corral.images.checking import Checker
from corral.images.committer import CommitOptions, Committer
from corral.images.exporter import Exporter, ExportOptions
from corral.images.images import Images, Only
from corral.images.importer import Format, Importer, ImportOptions
from corral.images.recipes import Recipes
from corral.images.reference import parse_reference
from corral.images.registries import Registries
from corral.images.servicers.call import lease_of
from corral.images.servicers.inflow import Inflow
from corral.images.servicers.progress import ProgressQueue
from corral.images.servicers.transfers import Transfers
from corral.rpc.checking import check
from corral.rpc.context import current_namespace, may_be_repeated
from corral.rpc.errors import InvalidArgument
from corral.rpc.events import stream_events
from corral.store import Database

type Context = grpc.aio.ServicerContext[Any, Any]


class ImagesServicer(images_pb2_grpc.ImagesServicer):
    """See the proto."""

    def __init__(
        self,
        images: Images,
        importer: Importer,
        exporter: Exporter,
        committer: Committer,
        registries: Registries,
        accounts: Accounts,
        checker: Checker,
        recipes: Recipes,
        database: Database,
        *,
        keep_blobs: bool,
    ) -> None:
        self._images = images
        self._importer = importer
        self._exporter = exporter
        self._committer = committer
        self._transfers = Transfers(registries, self._message, self._spare)
        self._accounts = accounts
        self._checker = checker
        self._recipes = recipes
        self._keep_blobs = keep_blobs
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
            async with aclosing(progress.of(work)) as items:
                async for item in items:
                    yield pb.ImportResponse(progress=item)
        for record in work.result():
            await self._spare(record, keep=first.header.keep_blobs if first.header.HasField("keep_blobs") else None)
        images = [self._message(record) for record in work.result()]
        yield pb.ImportResponse(result=pb.ImportResult(images=images))

    async def Export(self, request: pb.ExportRequest, context: Context) -> AsyncIterator[pb.ExportResponse]:
        async with aclosing(self._exporter.run(export_options(request, current_namespace()))) as chunks:
            async for chunk in chunks:
                if chunk:
                    yield pb.ExportResponse(data=chunk)

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[pb.PullResponse]:
        may_be_repeated()  # what has been fetched stays for a while
        async with aclosing(self._transfers.pull(request, lease_of(context))) as responses:
            async for response in responses:
                yield response

    async def Push(self, request: pb.PushRequest, context: Context) -> AsyncIterator[pb.PushResponse]:
        async with aclosing(self._transfers.push(request)) as responses:
            async for response in responses:
                yield response

    async def Login(self, request: pb.LoginRequest, context: Context) -> pb.LoginResponse:
        return await self._transfers.login(request)

    async def Referrers(self, request: pb.ReferrersRequest, context: Context) -> pb.ReferrersResponse:
        return await self._transfers.referrers(request)

    async def Get(self, request: pb.GetImageRequest, context: Context) -> pb.Image:
        record = self._images.find(current_namespace(), request.name)
        message = self._message(record)
        message.offered.extend(wire.from_descriptor(each) for each in await self._images.offers.of(record))
        return message

    async def List(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        views = await self._images.view_all(current_namespace(), request.pattern)
        return pb.ListImagesResponse(images=[wire.from_image(view) for view in views])

    async def Tag(self, request: pb.TagImageRequest, context: Context) -> pb.Image:
        return self._message(await self._images.tag(current_namespace(), request.source, request.target))

    async def Commit(self, request: pb.CommitImageRequest, context: Context) -> pb.Image:
        options = CommitOptions(
            namespace=current_namespace(),
            key=request.key,
            name=parse_reference(request.name) if request.name else None,
            config=wire.to_config(request.config),
            author=request.author,
            comment=request.comment,
            created_by=request.created_by,
            lease=lease_of(context),
        )
        record = await self._committer.commit(options)
        await self._spare(record, keep=None)
        return self._message(record)

    async def Remove(self, request: pb.RemoveImageRequest, context: Context) -> pb.RemoveImageResponse:
        removed = await self._images.remove(current_namespace(), request.name, force=request.force)
        deleted, reclaimed = wire.from_collected(removed.collected)
        return pb.RemoveImageResponse(untagged=removed.untagged, deleted=deleted, reclaimed_bytes=reclaimed)

    async def Prune(self, request: pb.PruneRequest, context: Context) -> pb.PruneResponse:
        until_ns = wire.time_ns(request.until) if request.HasField("until") else None
        only = Only(until_ns, tuple(request.labels), tuple(request.without_labels))
        removed = await self._images.prune(current_namespace(), everything=request.all, only=only)
        deleted, reclaimed = wire.from_collected(removed.collected)
        return pb.PruneResponse(untagged=removed.untagged, deleted=deleted, reclaimed_bytes=reclaimed)

    async def DiskUsage(self, request: pb.DiskUsageRequest, context: Context) -> pb.DiskUsageResponse:
        return wire.from_disk_usage(await self._accounts.usage(current_namespace()))

    async def Check(self, request: types.CheckRequest, context: Context) -> types.CheckResponse:
        return await check("images", partial(self._checker.look, deep=request.deep), repair=request.repair)

    async def Events(self, request: types.EventsRequest, context: Context) -> AsyncIterator[types.EventsResponse]:
        async for response in stream_events(self._database.journal, request):
            yield response

    async def _spare(self, record: ImageRecord, *, keep: bool | None) -> None:
        """Drop the blobs of what is unpacked now, if they shall not be kept. keep=None: as it is set."""
        if not (self._keep_blobs if keep is None else keep):
            await self._recipes.spare(record)

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


def export_options(request: pb.ExportRequest, namespace: str) -> ExportOptions:
    """Raises InvalidArgument."""
    form = Format(request.format)
    if form is Format.ROOTFS:
        raise InvalidArgument("an image is exported as a docker-archive or an OCI archive, not as a root file system")
    return ExportOptions(
        namespace=namespace,
        names=list(request.names),
        for_docker=form is Format.DOCKER_ARCHIVE,
        platform=wire.to_platform(request.platform) if request.platform.architecture else None,
    )


async def _data(requests: AsyncIterator[pb.ImportRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "data":
            raise InvalidArgument("an import has one header, then only data")
        yield request.data
