# Generated from corral/client/aio/networks.py by cli/generate_sync.py.
"""Networks."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corral.api.engine.v1 import engine_pb2
    from corral.api.network.v1 import network_pb2
    from corral.client.sync import Client


class Networks:
    """Networks. `name` is a name, an id, or an unambiguous prefix of an id."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def create(self, request: "network_pb2.CreateNetworkRequest") -> "network_pb2.Network":
        """Makes a network."""
        from corral.api.network.v1 import network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        return leaf.unary(stub.Create, request)

    def get(self, name: str) -> "network_pb2.Network":
        """All facts about one network."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        return leaf.unary(stub.Get, network_pb2.GetNetworkRequest(name=name))

    def list(self) -> "Sequence[network_pb2.Network]":
        """All networks."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        answer = leaf.unary(stub.List, network_pb2.ListNetworksRequest())
        return answer.networks

    def connect(
        self,
        network: str,
        container: str,
        *,
        ipv4_address: str = "",
        ipv6_address: str = "",
        mac_address: str = "",
        aliases: Iterable[str] = (),
        interface: str = "",
        rate: str = "",
    ) -> "engine_pb2.Container":
        """Puts a container into one more network: at once if it runs, else with its next start.

        aliases: further names that the others in there find it by. interface: its name inside, `eth1` say. rate: bits
        per second that it may receive and send there, "100m", or each, "100m/20m".
        """
        from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc
        from corral.api.network.v1 import network_pb2
        from corral.client.network_options import limit

        attachment = network_pb2.NetworkAttachment(
            network=network,
            ipv4_address=ipv4_address,
            ipv6_address=ipv6_address,
            mac_address=mac_address,
            aliases=aliases,
            interface=interface,
        )
        if rate:
            limit(attachment, rate)
        engine = self._client.engine()
        stub = engine_pb2_grpc.ContainersStub(engine.channel)
        request = engine_pb2.ConnectContainerRequest(container=container, network=attachment)
        return engine.unary(stub.Connect, request)

    def disconnect(self, network: str, container: str) -> "engine_pb2.Container":
        """Takes a container out of a network."""
        from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc

        engine = self._client.engine()
        stub = engine_pb2_grpc.ContainersStub(engine.channel)
        request = engine_pb2.DisconnectContainerRequest(container=container, network=network)
        return engine.unary(stub.Disconnect, request)

    def explain(self, container_id: str, destination: str = "") -> "Sequence[network_pb2.ExplainedStep]":
        """Why a packet of a running container would reach an address, by default one of the internet, or not.

        container_id: its whole id.
        """
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.EndpointsStub(leaf.channel)
        request = network_pb2.ExplainRequest(endpoint_id=container_id, destination=destination)
        answer = leaf.unary(stub.Explain, request)
        return answer.steps

    def remove(self, name: str) -> None:
        """Removes a network that no container uses."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        leaf.unary(stub.Remove, network_pb2.RemoveNetworkRequest(name=name))
