"""The engine as a whole."""

from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc
from corral.api.types.v1 import types_pb2
from corral.client.async_transport import AsyncTransport

if TYPE_CHECKING:
    from corral.api.version.v1 import version_pb2
    from corral.client.aio import AsyncClient


class System:
    """The engine as a whole."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    @property
    def _engine(self) -> AsyncTransport:
        return self._client.engine()

    @cached_property
    def _stub(self) -> "engine_pb2_grpc.SystemAsyncStub":
        return engine_pb2_grpc.SystemStub(self._engine.channel)

    async def version(self) -> "version_pb2.GetResponse":
        """What answers at this client's address."""
        from corral.api.version.v1 import version_pb2, version_pb2_grpc

        stub = version_pb2_grpc.VersionStub(self._engine.channel)
        return await self._engine.unary(stub.Get, version_pb2.GetRequest())

    async def upgrade(self) -> "tuple[version_pb2.GetResponse, version_pb2.UpgradeResponse]":
        """Has the daemon, and the processes whose services it calls, execute themselves anew; what it was, and is then.

        Raises FailedPrecondition if what is on disk would not start: the daemon goes on.
        """
        from corral.api.version.v1 import version_pb2, version_pb2_grpc

        stub = version_pb2_grpc.VersionStub(self._engine.channel)
        before = await self._engine.unary(stub.Get, version_pb2.GetRequest())
        request = version_pb2.UpgradeRequest(generation=before.generation)
        return before, await self._engine.unary(stub.Upgrade, request)

    async def info(self) -> engine_pb2.InfoResponse:
        """Counts, directories and facts about the host."""
        return await self._engine.unary(self._stub.Info, engine_pb2.InfoRequest())

    async def addresses(self) -> engine_pb2.AddressesResponse:
        """Where each service is reached."""
        return await self._engine.unary(self._stub.Addresses, engine_pb2.AddressesRequest())

    async def disk_usage(self) -> engine_pb2.DiskUsageResponse:
        """What images, containers and volumes take on disk, and what of it could go."""
        return await self._engine.unary(self._stub.DiskUsage, engine_pb2.DiskUsageRequest())

    async def check(self, *, repair: bool = False, deep: bool = False) -> Sequence[types_pb2.Finding]:
        """What does not fit together, in all services and namespaces; with `repair` it is put right.

        deep: every blob is hashed, too.
        """
        request = types_pb2.CheckRequest(repair=repair, deep=deep)
        answer = await self._engine.unary(self._stub.Check, request)
        return answer.findings

    async def check_host(self) -> Sequence[engine_pb2.Check]:
        """What the host has and lacks for running containers."""
        answer = await self._engine.unary(self._stub.CheckHost, engine_pb2.CheckHostRequest())
        return answer.checks

    async def events(self, request: types_pb2.EventsRequest) -> AsyncIterator[types_pb2.EventsResponse]:
        """The journal of all services: replayed from `request.after`, then followed, over upgrades too."""
        rest = types_pb2.EventsRequest()
        rest.CopyFrom(request)
        async for answer in self._engine.stream(self._stub.Events, request, lambda: rest):
            for event in answer.events[-1:]:
                rest.after = event.seq
            yield answer
