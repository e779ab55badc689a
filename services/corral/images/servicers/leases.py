"""corral.images.v1.Leases."""
# ruff: noqa: N802 (methods are named as the RPCs are)

from typing import Any

import grpc.aio

from corral.api.images.v1 import images_pb2 as pb
from corral.api.images.v1 import images_pb2_grpc
from corral.images import leases, wire
from corral.images.collector import Collector
from corral.images.store import write_much
from corral.images.tending import Tending
from corral.rpc.context import current_namespace
from corral.store import Database

type Context = grpc.aio.ServicerContext[Any, Any]


class LeasesServicer(images_pb2_grpc.LeasesServicer):
    """See the proto."""

    def __init__(self, database: Database, collector: Collector, tending: Tending) -> None:
        self._database = database
        self._collector = collector
        self._tending = tending

    async def Create(self, request: pb.CreateLeaseRequest, context: Context) -> pb.Lease:
        namespace, ttl_ns, labels = current_namespace(), wire.duration_ns(request.ttl), dict(request.labels)
        lease = await self._database.write(lambda t: leases.create(t, namespace, request.id, ttl_ns, labels))
        self._collector.schedule()
        return wire.from_lease(lease)

    async def Renew(self, request: pb.RenewLeaseRequest, context: Context) -> pb.Lease:
        namespace, ttl_ns = current_namespace(), wire.duration_ns(request.ttl)
        lease = await self._database.write(lambda t: leases.renew(t, namespace, request.id, ttl_ns))
        self._collector.schedule()
        return wire.from_lease(lease)

    async def Delete(self, request: pb.DeleteLeaseRequest, context: Context) -> pb.DeleteLeaseResponse:
        namespace = current_namespace()
        self._tending.remove(await write_much(self._database, lambda t: leases.end(t, namespace, request.id)))
        await self._collector.collect()
        self._collector.schedule()
        return pb.DeleteLeaseResponse()

    async def List(self, request: pb.ListLeasesRequest, context: Context) -> pb.ListLeasesResponse:
        namespace = current_namespace()
        found = self._database.read_sync(lambda s: leases.everything(s, namespace))
        return pb.ListLeasesResponse(leases=[wire.from_lease(lease) for lease in found])
