"""Networks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corral.api.network.v1 import network_pb2
    from corral.client.aio import AsyncClient


class Networks:
    """Networks. `name` is a name, an id, or an unambiguous prefix of an id."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def create(self, request: "network_pb2.CreateNetworkRequest") -> "network_pb2.Network":
        """Makes a network."""
        from corral.api.network.v1 import network_pb2_grpc

        leaf = await self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        return await leaf.unary(stub.Create, request)

    async def get(self, name: str) -> "network_pb2.Network":
        """All facts about one network."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = await self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        return await leaf.unary(stub.Get, network_pb2.GetNetworkRequest(name=name))

    async def list(self) -> "Sequence[network_pb2.Network]":
        """All networks."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = await self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        answer = await leaf.unary(stub.List, network_pb2.ListNetworksRequest())
        return answer.networks

    async def remove(self, name: str) -> None:
        """Removes a network that no container uses."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = await self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        await leaf.unary(stub.Remove, network_pb2.RemoveNetworkRequest(name=name))
