"""A small internet for tests: a host with corral's network leaf, a world outside, and packets between them.

    outside 203.0.113.1 --- 203.0.113.2 host (corrald --service network) --- bridges, endpoints

All of it lies in network namespaces that the lab makes, so no packet, rule, route or setting of the machine is
involved.
"""

import asyncio
import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pyroute2.iproute.linux import IPRoute

from corral.api.network.v1 import network_pb2 as pb
from corral.api.network.v1.network_pb2_grpc import EndpointsStub, NetworksStub
from corral.kernel.netns import create_pinned, in_namespace, remove_pinned
from corral.network.config import NetworkConfig
from corral.rpc.channel import open_channel
from corral.rpc.context import in_namespace as of_namespace
from support.corrald import Corrald, Place

if TYPE_CHECKING:
    import grpc.aio

    from corral.api.network.v1.network_pb2_grpc import EndpointsAsyncStub, NetworksAsyncStub

OUTSIDE, HOST = "203.0.113.1", "203.0.113.2"
BRIDGE, TABLE = "crlt0", "corraltest"
SUBNET, POOLS = "10.231.0.0/20", ["10.231.128.0/17"]
GATEWAY = "10.231.0.1"
READY = NetworkConfig().netns_pool_size
"""How many namespaces the leaf has ready for those who come."""
NAMESPACES = ("default", "other")
"""Of the API: those that tests use."""
BUILT_IN = ("bridge", "host", "none")
"""Networks that are always there."""
TIMEOUT_S = 3.0


@dataclass
class Lab:
    """Use as a context manager. The daemon can be stopped, killed and started at will; its host stays."""

    settings: Mapping[str, object] = field(default_factory=dict)
    place: Place = field(default_factory=Place.make)

    def __enter__(self) -> Self:
        for path in (self.host, self.outside):
            create_pinned(path)
        self._wire()
        network = {
            "bridge": BRIDGE,
            "nft_table": TABLE,
            "subnet": SUBNET,
            "pools": POOLS,
            "forward": "accept",
            **self.settings,
        }
        self.corrald = Corrald(
            services=("network",),
            netns=self.host,
            place=self.place,
            settings={"network": network},
            # The old iptables of this host is not the machine's.
            environment={"XTABLES_LOCKFILE": str(self.place.directory / "xtables.lock")},
        )
        self.corrald.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: object) -> None:
        if e is not None:
            sys.stderr.write(self.corrald.log()[-8000:])
        for path in (self.host, self.outside):
            remove_pinned(path)
        self.corrald.close()

    def _wire(self) -> None:
        def cable() -> None:
            with IPRoute() as netlink, self.host.open() as host:
                peer = {"ifname": "uplink", "net_ns_fd": host.fileno()}
                netlink.link("add", ifname="world", kind="veth", peer=peer)
            configure("world", OUTSIDE)

        in_namespace(self.outside, cable)
        in_namespace(self.host, lambda: configure("uplink", HOST, gateway=OUTSIDE))
        # A new namespace copies some settings of the machine.
        in_namespace(self.host, lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("0"))

    @property
    def host(self) -> Path:
        return self.place.directory / "host"

    @property
    def outside(self) -> Path:
        return self.place.directory / "outside"

    @property
    def pins(self) -> set[str]:
        """Names of the namespaces that the daemon has pinned, ready ones included."""
        return {path.name for path in (self.place.state / "netns").iterdir()}

    def on_host[T](self, work: Callable[[], T]) -> T:
        return in_namespace(self.host, work)

    def links(self, where: Path | None = None) -> dict[str, str]:
        """Names of the links on the host, or elsewhere, each with the bridge it is in."""
        listed = command(where or self.host, "ip", "-j", "link")
        return {link["ifname"]: link.get("master", "") for link in json.loads(listed)}

    def veths(self) -> set[str]:
        """The host's ends of veth pairs that are corral's."""
        return {name for name in self.links() if name.startswith("crl") and name not in self.bridges()}

    def bridges(self) -> set[str]:
        listed = command(self.host, "ip", "-j", "link", "show", "type", "bridge")
        return {link["ifname"] for link in json.loads(listed) if link}

    def ruleset(self) -> str:
        return command(self.host, "nft", "list", "ruleset")

    def settled(self) -> bool:
        """Whether what was detached has gone from the kernel; waits for it, as it goes in the kernel's own time."""
        return eventually(lambda: not self.veths())

    @contextlib.asynccontextmanager
    async def calls(self) -> "AsyncIterator[Calls]":
        async with open_channel(self.corrald.address_of("network")) as channel:
            # gRPC has one connection for all channels to an address: it may still be pausing since a daemon was killed.
            await asyncio.wait_for(channel.channel_ready(), TIMEOUT_S)
            yield Calls(channel)


class Calls:
    """The leaf over gRPC, in the words of the tests."""

    def __init__(self, channel: "grpc.aio.Channel") -> None:
        self.endpoints: EndpointsAsyncStub = EndpointsStub(channel)
        self.networks: NetworksAsyncStub = NetworksStub(channel)

    async def attach(self, name: str, *networks: str, **fields: object) -> pb.Endpoint:
        attachments = [pb.NetworkAttachment(network=network) for network in networks]
        fields.setdefault("networks", attachments)
        return await self.endpoints.Attach(pb.AttachRequest(endpoint_id=name, **fields))  # type: ignore[arg-type]

    async def detach(self, name: str, *, must_exist: bool = False) -> None:
        await self.endpoints.Detach(pb.DetachRequest(endpoint_id=name, must_exist=must_exist))

    async def get(self, name: str) -> pb.Endpoint:
        return await self.endpoints.Get(pb.GetEndpointRequest(endpoint_id=name))

    async def ids(self, **fields: object) -> list[str]:
        answer = await self.endpoints.List(pb.ListEndpointsRequest(**fields))  # type: ignore[arg-type]
        return [endpoint.id for endpoint in answer.endpoints]

    async def create(self, name: str, *cidrs: str, **fields: object) -> pb.Network:
        fields.setdefault("subnets", [pb.Subnet(cidr=cidr) for cidr in cidrs])
        return await self.networks.Create(pb.CreateNetworkRequest(name=name, **fields))  # type: ignore[arg-type]

    async def network(self, name: str) -> pb.Network:
        return await self.networks.Get(pb.GetNetworkRequest(name=name))

    async def remove(self, name: str) -> None:
        await self.networks.Remove(pb.RemoveNetworkRequest(name=name))

    async def network_names(self) -> list[str]:
        return [network.name for network in (await self.networks.List(pb.ListNetworksRequest())).networks]

    async def clear(self) -> None:
        """Detach all endpoints and remove all networks but the built-in ones."""
        for namespace in NAMESPACES:
            with of_namespace(namespace):
                for name in await self.ids():
                    await self.detach(name)
                for name in await self.network_names():
                    if name not in BUILT_IN:
                        await self.remove(name)


def port(inside: int = 7, host: int = 8080, **fields: str) -> pb.PortMapping:
    return pb.PortMapping(container_port=inside, host_port=host, **fields)  # type: ignore[arg-type]


def address(endpoint: pb.Endpoint, number: int = 0) -> str:
    return endpoint.interfaces[number].ipv4_address.partition("/")[0]


def configure(name: str, own: str, *, gateway: str = "") -> None:
    """Give a link of the calling thread's namespace a /24 address and a default route."""
    index = socket.if_nametoindex(name)
    with IPRoute() as netlink:
        netlink.addr("add", index=index, address=own, prefixlen=24)
        netlink.link("set", index=socket.if_nametoindex("lo"), state="up")
        netlink.link("set", index=index, state="up")
        if gateway:
            netlink.route("add", dst="default", gateway=gateway, oif=index)


def command(where: str | Path, *arguments: str) -> str:
    """What a program prints that runs inside a namespace."""
    result = subprocess.run(
        ["nsenter", f"--net={where}", *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return result.stdout


def reaches(where: str | Path, target: str, *, within_s: float = TIMEOUT_S) -> bool:
    """Whether an ICMP echo request sent inside a namespace is answered."""
    return in_namespace(Path(where), lambda: _ping(target, within_s))


def _ping(target: str, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    packet = _echo_request(os.getpid() & 0xFFFF)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        while (left := deadline - time.monotonic()) > 0:
            try:
                icmp.sendto(packet, (target, 0))
            except OSError:
                return False  # no route
            ready, _, _ = select.select([icmp], [], [], min(left, 0.5))
            if ready:
                data, (source, _) = icmp.recvfrom(2048)
                if source == target and data[20] == 0 and data[24:26] == packet[4:6]:
                    return True
    return False


def _echo_request(identifier: int) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, identifier, 1)
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    return body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]


@contextlib.contextmanager
def tcp_server(where: str | Path, own: str, port: int = 7) -> Iterator[list[str]]:
    """Listens inside a namespace; the list fills with the addresses of those who came, as seen from there."""
    came: list[str] = []
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    listener = in_namespace(Path(where), lambda: socket.create_server((own, port), family=family))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, (source, *_) = listener.accept()
                came.append(source)
                connection.sendall(source.encode())
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield came
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def tcp_call(where: str | Path, target: str, port: int = 7) -> str:
    """What a tcp_server answers to somebody inside a namespace. Raises OSError."""

    def call() -> str:
        with socket.create_connection((target, port), TIMEOUT_S) as connection:
            return connection.recv(100).decode()

    return in_namespace(Path(where), call)


def eventually(condition: Callable[[], object], *, within_s: float = 20.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def text(path: str) -> str:
    return Path(path).read_text("utf-8")


def lines(path: str) -> Sequence[str]:
    return text(path).splitlines()


def exists(path: str | Path) -> bool:
    return Path(path).exists()


def permissions(path: str) -> int:
    return Path(path).stat().st_mode & 0o777


@contextlib.contextmanager
def holding(netns: str) -> Iterator[Path]:
    """Somebody keeps a namespace alive within the block, and can go into it."""
    with open(netns) as file:
        yield Path(f"/proc/self/fd/{file.fileno()}")
