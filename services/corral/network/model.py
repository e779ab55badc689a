"""Networks and endpoints as values: what is asked for, what is recorded, what is answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from corral.network.ipam import Address, Subnet

DEFAULT_NETWORK = "bridge"
BRIDGE_DRIVER, CNI_DRIVER = "bridge", "cni"
# The namespace of networks that corral itself made: they are seen from every namespace.
BUILTIN_NAMESPACE = ""


class NetworkState(StrEnum):
    """Rows are written before and after the kernel's part, so that a next start can finish or undo it."""

    CREATING = "creating"
    READY = "ready"
    REMOVING = "removing"


class EndpointState(StrEnum):
    """ATTACHING rows are undone by a next start."""

    ATTACHING = "attaching"
    READY = "ready"


class Mode(StrEnum):
    """Whose network namespace an endpoint has."""

    NETWORKS = "networks"
    NONE = "none"
    HOST = "host"
    CONTAINER = "container"
    PATH = "path"

    @property
    def has_own_namespace(self) -> bool:
        return self in (Mode.NETWORKS, Mode.NONE)


@dataclass(frozen=True, slots=True)
class Range:
    """One subnet of a network."""

    subnet: Subnet
    gateway: Address
    window: Subnet | None = None  # addresses are given out only from here
    reserved: tuple[Address, ...] = ()
    id: int = 0  # of its row


@dataclass(frozen=True, slots=True)
class Network:
    """One network. Builtin ones without a bridge (host, none) have no rows anywhere."""

    id: str
    namespace: str
    name: str
    driver: str
    bridge: str = ""
    ranges: tuple[Range, ...] = ()
    mtu: int = 0
    internal: bool = False
    ipv6: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    created_ns: int = 0
    state: NetworkState = NetworkState.READY

    @property
    def builtin(self) -> bool:
        return self.namespace == BUILTIN_NAMESPACE

    @property
    def is_bridge(self) -> bool:
        """Whether it has a bridge of this host, with rules, ports and names."""
        return self.driver == BRIDGE_DRIVER

    @property
    def is_cni(self) -> bool:
        """Whether plugins make it: addresses, links and routes are theirs."""
        return self.driver == CNI_DRIVER

    @property
    def is_secluded(self) -> bool:
        """Whether the link that its endpoints hang on is in a namespace of its own, pinned under the name in `bridge`:
        a network that not even the host is in."""
        return bool(self.bridge) and not self.is_bridge and not self.is_cni and not self.options.get("parent")

    @property
    def lower(self) -> str:
        """The link that its endpoints hang on; ours if it has the name in `bridge`."""
        return self.bridge if self.is_bridge else self.options.get("parent", "") or self.bridge


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """What Create was asked for."""

    namespace: str
    name: str
    driver: str = BRIDGE_DRIVER
    ranges: Sequence[Range] = ()
    mtu: int = 0
    internal: bool = False
    ipv6: bool = False
    interface: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EndpointKey:
    """Names an endpoint: ids are unique within a namespace."""

    namespace: str
    id: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """One network as asked for."""

    network: str
    ipv4: str = ""
    ipv6: str = ""
    mac: str = ""
    aliases: tuple[str, ...] = ()
    interface: str = ""
    receive_bps: int = 0  # what it may receive and send; 0: no limit
    send_bps: int = 0
    routes: tuple[tuple[str, str], ...] = ()  # destinations, each with its gateway


@dataclass(frozen=True, slots=True)
class Dns:
    """Settings of /etc/resolv.conf; what is empty is as the host has it."""

    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


ANY_HOST_IPS = ("", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Port:
    """A port of the host that leads to one of the container."""

    protocol: str
    container_port: int
    host_port: int = 0  # 0: one is to be chosen
    host_ip: str = ""  # "": all addresses of the host
    last_host_port: int = 0  # the first that is free from host_port to this one is to be chosen

    def allows(self, host_port: int) -> bool:
        """Whether one that is asked for like this can be published there."""
        return not self.host_port or self.host_port <= host_port <= (self.last_host_port or self.host_port)

    @property
    def numbers(self) -> range:
        """What it can be; none if it may be any."""
        return range(self.host_port, (self.last_host_port or self.host_port) + 1) if self.host_port else range(0)

    @property
    def is_chosen(self) -> bool:
        """Whether it is one port of the host."""
        return bool(self.host_port) and not self.last_host_port

    def __hash__(self) -> int:
        """Cheap: of a container with many, all are looked up for each that comes."""
        return self.host_port << 16 | self.container_port

    @property
    def version(self) -> int | None:
        """The IP version that it is published for; None: both."""
        return None if not self.host_ip else 6 if ":" in self.host_ip else 4

    def __str__(self) -> str:
        host = f"[{self.host_ip}]" if ":" in self.host_ip else self.host_ip
        last = f"-{self.last_host_port}" if self.last_host_port else ""
        return f"{host}{':' * bool(host)}{self.host_port}{last}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Forward:
    """Where a published port leads, for one IP version."""

    protocol: str
    host_ip: str
    host_port: int
    address: Address
    container_port: int


@dataclass(frozen=True, slots=True)
class Request:
    """What Attach was asked for; two equal ones are one call made twice."""

    mode: Mode
    attachments: tuple[Attachment, ...] = ()
    container: str = ""
    netns_path: str = ""
    hostname: str = ""
    domainname: str = ""
    dns: Dns = Dns()
    extra_hosts: tuple[tuple[str, str], ...] = ()
    sysctls: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    ports: tuple[Port, ...] = ()


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface of an endpoint, with its place in a network."""

    network: Network
    name: str  # inside
    host_name: str  # the other end, on the network's bridge; where there is none nothing has that name
    mac: str
    addresses: tuple[tuple[Address, Range], ...] = ()
    aliases: tuple[str, ...] = ()
    # In a network of CNI: what its plugins said that they made, as JSON; "" if they have not, or nobody knows.
    cni_result: str = ""

    def address(self, version: int) -> tuple[Address, Range] | None:
        """The address of that IP version, with its subnet."""
        return next((held for held in self.addresses if held[0].version == version), None)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint as recorded."""

    key: EndpointKey
    request: Request
    # The namespace's pin: a name in our directory for own ones, a path of somebody else, or empty for the host's.
    netns: str
    interfaces: Sequence[Interface]
    state: EndpointState
    boot_id: str
    created_ns: int
    # Id of the endpoint, in the same namespace, whose namespace and files it shares; empty: its own.
    owner: str = ""
    # Those that are published now.
    ports: tuple[Port, ...] = ()

    @property
    def mode(self) -> Mode:
        return self.request.mode
