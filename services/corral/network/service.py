"""The RPCs of the network leaf: Networks and Endpoints."""
# ruff: noqa: N802 (methods are named as the RPCs are)

from collections.abc import AsyncIterator, Sequence

import grpc.aio

from corral.api.network.v1 import network_pb2, network_pb2_grpc
from corral.api.types.v1 import types_pb2
from corral.kernel.rlimits import raise_soft
from corral.network import etc, subnets, wire
from corral.network.config import NetworkConfig
from corral.network.leaf import Leaf
from corral.network.model import Endpoint, EndpointKey
from corral.rpc.blocking import run_blocking
from corral.rpc.checking import check
from corral.rpc.context import check_id, current_namespace
from corral.rpc.events import stream_events

# An address of the internet, to look up a way to; nothing is sent there.
SOMEWHERE = "1.1.1.1"


class NetworkService:
    """The leaf, hosted. See corral.rpc.service for its life."""

    name = "network"

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._leaf: Leaf | None = None

    @property
    def leaf(self) -> Leaf:
        assert self._leaf is not None, "no RPC is let in before start()"
        return self._leaf

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        network_pb2_grpc.add_NetworksServicer_to_server(_Networks(self), server)
        network_pb2_grpc.add_EndpointsServicer_to_server(_Endpoints(self), server)
        services = network_pb2.DESCRIPTOR.services_by_name
        return [services[name].full_name for name in ("Networks", "Endpoints")]

    async def start(self) -> None:
        raise_soft("RLIMIT_NOFILE")  # each published port costs up to three sockets
        self._leaf = await run_blocking(Leaf, self._config)
        await self._leaf.start()

    async def stop(self) -> None:
        leaf, self._leaf = self._leaf, None
        if leaf is not None:
            await leaf.close()


type _Context = grpc.aio.ServicerContext[object, object]


class _Networks(network_pb2_grpc.NetworksServicer):
    def __init__(self, service: NetworkService) -> None:
        self._service = service

    async def Create(self, request: network_pb2.CreateNetworkRequest, context: _Context) -> network_pb2.Network:
        namespace, networks = current_namespace(), self._service.leaf.networks
        made = await networks.create(wire.network_spec(request, namespace))
        return wire.network(await networks.describe(namespace, made.id))

    async def Get(self, request: network_pb2.GetNetworkRequest, context: _Context) -> network_pb2.Network:
        return wire.network(await self._service.leaf.networks.describe(current_namespace(), request.name))

    async def List(
        self, request: network_pb2.ListNetworksRequest, context: _Context
    ) -> network_pb2.ListNetworksResponse:
        found = await self._service.leaf.networks.describe_all(current_namespace())
        return network_pb2.ListNetworksResponse(networks=[wire.network(one) for one in found])

    async def Remove(
        self, request: network_pb2.RemoveNetworkRequest, context: _Context
    ) -> network_pb2.RemoveNetworkResponse:
        await self._service.leaf.networks.remove(current_namespace(), request.name)
        return network_pb2.RemoveNetworkResponse()

    async def Check(self, request: types_pb2.CheckRequest, context: _Context) -> types_pb2.CheckResponse:
        return await check("network", self._service.leaf.checker.look, repair=request.repair)

    async def Events(
        self, request: types_pb2.EventsRequest, context: _Context
    ) -> AsyncIterator[types_pb2.EventsResponse]:
        async for response in stream_events(self._service.leaf.db.journal, request):
            yield response


class _Endpoints(network_pb2_grpc.EndpointsServicer):
    def __init__(self, service: NetworkService) -> None:
        self._service = service

    async def Attach(self, request: network_pb2.AttachRequest, context: _Context) -> network_pb2.Endpoint:
        asked = wire.attach_request(request)
        return self._answer(await self._service.leaf.endpoints.attach(_key(request.endpoint_id), asked))

    async def Detach(self, request: network_pb2.DetachRequest, context: _Context) -> network_pb2.DetachResponse:
        await self._service.leaf.endpoints.detach(_key(request.endpoint_id), must_exist=request.must_exist)
        return network_pb2.DetachResponse()

    async def Get(self, request: network_pb2.GetEndpointRequest, context: _Context) -> network_pb2.Endpoint:
        return self._answer(self._service.leaf.endpoints.get(_key(request.endpoint_id)))

    async def List(
        self, request: network_pb2.ListEndpointsRequest, context: _Context
    ) -> network_pb2.ListEndpointsResponse:
        leaf, namespace = self._service.leaf, current_namespace()
        network = await leaf.networks.get(namespace, request.network) if request.network else None
        found = await leaf.endpoints.list(None if request.all_namespaces else namespace, network)
        return network_pb2.ListEndpointsResponse(endpoints=[self._answer(endpoint) for endpoint in found])

    async def Connect(self, request: network_pb2.ConnectRequest, context: _Context) -> network_pb2.Endpoint:
        key, attachment = _key(request.endpoint_id), wire.attachment(request.network)
        return self._answer(await self._service.leaf.endpoints.connect(key, attachment))

    async def Disconnect(self, request: network_pb2.DisconnectRequest, context: _Context) -> network_pb2.Endpoint:
        return self._answer(await self._service.leaf.endpoints.disconnect(_key(request.endpoint_id), request.network))

    async def Publish(self, request: network_pb2.PublishRequest, context: _Context) -> network_pb2.Endpoint:
        key, ports = _key(request.endpoint_id), wire.ports(request.ports)
        return self._answer(await self._service.leaf.endpoints.publish(key, ports))

    async def Unpublish(self, request: network_pb2.UnpublishRequest, context: _Context) -> network_pb2.Endpoint:
        key, ports = _key(request.endpoint_id), wire.ports(request.ports)
        return self._answer(await self._service.leaf.endpoints.unpublish(key, ports))

    async def Explain(self, request: network_pb2.ExplainRequest, context: _Context) -> network_pb2.ExplainResponse:
        destination = subnets.parse_address(request.destination or SOMEWHERE, "destination")
        steps = await self._service.leaf.explain(_key(request.endpoint_id), destination)
        return network_pb2.ExplainResponse(steps=[wire.explained(step) for step in steps])

    def _answer(self, endpoint: Endpoint) -> network_pb2.Endpoint:
        endpoints = self._service.leaf.endpoints
        return wire.endpoint(
            endpoint,
            netns_path=endpoints.netns_path(endpoint),
            files=endpoints.files_directory(endpoint),
            own_hostname=etc.hostname_of(endpoint),
        )


def _key(endpoint_id: str) -> EndpointKey:
    return EndpointKey(current_namespace(), check_id(endpoint_id, "endpoint id"))
