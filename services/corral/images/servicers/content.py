"""corral.images.v1.Content."""
# ruff: noqa: N802 (methods are named as the RPCs are)

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from corral.api.images.v1 import images_pb2 as pb
from corral.api.images.v1 import images_pb2_grpc
from corral.images import wire
from corral.images.blobs import Blobs, Expected
from corral.images.digest import parse_digest
from corral.images.servicers.call import lease_of
from corral.images.servicers.inflow import Inflow
from corral.rpc.context import current_namespace
from corral.rpc.errors import InvalidArgument

type Context = grpc.aio.ServicerContext[Any, Any]


class ContentServicer(images_pb2_grpc.ContentServicer):
    """See the proto."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def Info(self, request: pb.BlobInfoRequest, context: Context) -> pb.BlobInfo:
        digest = parse_digest(request.digest)
        self._blobs.check_held(current_namespace(), digest)
        return wire.from_blob(self._blobs.info(digest))

    async def List(self, request: pb.ListBlobsRequest, context: Context) -> AsyncIterator[pb.BlobInfo]:
        for blob in await self._blobs.list(current_namespace()):
            yield wire.from_blob(blob)

    async def Read(self, request: pb.ReadBlobRequest, context: Context) -> AsyncIterator[pb.BlobChunk]:
        if request.offset < 0 or request.length < 0:
            raise InvalidArgument("offset and length are not negative")
        digest = parse_digest(request.digest)
        self._blobs.check_held(current_namespace(), digest)
        async for data in self._blobs.read(digest, request.offset, request.length):
            yield pb.BlobChunk(data=data)

    async def Write(self, request_iterator: AsyncIterator[pb.WriteBlobRequest], context: Context) -> pb.BlobInfo:
        async with Inflow(request_iterator) as requests:
            first = await anext(requests, pb.WriteBlobRequest())
            digest = parse_digest(first.expected.digest) if first.expected.digest else None
            expected = Expected(digest, first.expected.size_bytes)
            data = _data(first, requests)
            return wire.from_blob(await self._blobs.write(expected, data, current_namespace(), lease_of(context)))

    async def Delete(self, request: pb.DeleteBlobRequest, context: Context) -> pb.DeleteBlobResponse:
        await self._blobs.delete(parse_digest(request.digest), current_namespace())
        return pb.DeleteBlobResponse()


async def _data(first: pb.WriteBlobRequest, rest: AsyncIterator[pb.WriteBlobRequest]) -> AsyncIterator[bytes]:
    yield first.data
    async for request in rest:
        yield request.data
