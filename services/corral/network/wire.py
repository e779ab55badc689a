"""Between wire messages and values; what comes from the wire is checked here."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from google.protobuf.timestamp_pb2 import Timestamp

from corral.api.network.v1 import network_pb2
from corral.network import subnets, sysctls
from corral.network.etc import HOST_GATEWAY
from corral.network.explaining import Step, Verdict
from corral.network.files import HOSTNAME, HOSTS, RESOLV_CONF
from corral.network.model import BRIDGE_DRIVER, Attachment, Dns, Endpoint, Interface, Mode, NetworkSpec, Port, Request
from corral.network.networks import Described
from corral.network.plans import attachments
from corral.rpc.context import check_id
from corral.rpc.errors import InvalidArgument

# RFC 1123, and the underscore that people use. They become lines of /etc/hosts, so nothing else passes.
_HOSTNAME = re.compile(r"[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9_])?(\.[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9_])?)*\.?")
MAX_HOSTNAME = 64  # Linux: __NEW_UTS_LEN
MAX_DOMAIN = 253
MIN_RATE_BPS, MAX_RATE_BPS = 8_000, 10**12
_RESOLVER_WORD = re.compile(r"[a-zA-Z0-9_.:%-]+")
_NAMESPACE_PATH = re.compile(r"/[^\0\n]+")

_MODES: Mapping[network_pb2.AttachRequest.Mode.ValueType, Mode] = {
    network_pb2.AttachRequest.MODE_UNSPECIFIED: Mode.NETWORKS,
    network_pb2.AttachRequest.MODE_NETWORKS: Mode.NETWORKS,
    network_pb2.AttachRequest.MODE_NONE: Mode.NONE,
    network_pb2.AttachRequest.MODE_HOST: Mode.HOST,
    network_pb2.AttachRequest.MODE_CONTAINER: Mode.CONTAINER,
    network_pb2.AttachRequest.MODE_PATH: Mode.PATH,
}
_WIRE_MODES: Mapping[Mode, network_pb2.AttachRequest.Mode.ValueType] = {
    mode: number for number, mode in _MODES.items() if number != network_pb2.AttachRequest.MODE_UNSPECIFIED
}


# Networks


def network_spec(request: network_pb2.CreateNetworkRequest, namespace: str) -> NetworkSpec:
    """What Create asks for. Raises InvalidArgument."""
    ranges = [
        subnets.make_range(part.cidr, gateway=part.gateway, window=part.range, reserved=part.reserved)
        for part in request.subnets
    ]
    return NetworkSpec(
        namespace=namespace,
        name=check_id(request.name, "network name"),
        driver=request.driver or BRIDGE_DRIVER,
        ranges=ranges,
        mtu=request.mtu,
        internal=request.internal,
        ipv6=request.ipv6,
        interface=request.interface,
        options=dict(request.options),
        labels=dict(request.labels),
    )


def network(described: Described) -> network_pb2.Network:
    """A network as answered."""
    value = described.network
    parts = [
        network_pb2.Subnet(
            cidr=str(part.subnet),
            gateway=str(part.gateway),
            range=str(part.window or ""),
            reserved=[str(address) for address in part.reserved],
            used=used,
            free=free,
        )
        for part, (used, free) in zip(value.ranges, described.usage, strict=True)
    ]
    return network_pb2.Network(
        name=value.name,
        id=value.id,
        driver=value.driver,
        subnets=parts,
        interface="" if value.is_cni else value.lower,
        mtu=value.mtu,
        internal=value.internal,
        options=value.options,
        labels=value.labels,
        created_at=timestamp(value.created_ns),
        builtin=value.builtin,
        endpoints=[key.id for key in described.endpoints],
        ipv6=value.ipv6,
    )


# Endpoints


def attach_request(request: network_pb2.AttachRequest) -> Request:
    """What Attach asks for. Raises InvalidArgument, Unimplemented."""
    mode = _MODES.get(request.mode)
    if mode is None:
        raise InvalidArgument(f"mode {request.mode} is not known", reason="BAD_MODE")
    asked = Request(
        mode=mode,
        attachments=tuple(attachment(one) for one in request.networks),
        container=check_id(request.container_endpoint, "container") if request.container_endpoint else "",
        netns_path=request.netns_path,
        hostname=hostname(request.hostname, "hostname", MAX_HOSTNAME),
        domainname=hostname(request.domainname, "domain name", MAX_DOMAIN),
        dns=dns(request.dns),
        extra_hosts=tuple(_host_entry(entry) for entry in request.extra_hosts),
        sysctls=tuple(sorted(request.sysctls.items())),
        labels=tuple(sorted(request.labels.items())),
        ports=ports(request.ports),
    )
    _check_mode(asked)
    return asked


def _check_mode(asked: Request) -> None:
    """Raises InvalidArgument where fields do not go together."""
    mode = asked.mode
    if asked.attachments and mode is not Mode.NETWORKS:
        raise InvalidArgument(f"mode {mode} takes no networks", reason="BAD_MODE")
    if bool(asked.container) != (mode is Mode.CONTAINER):
        raise InvalidArgument("container_endpoint goes with mode container, and only with it", reason="BAD_MODE")
    if bool(asked.netns_path) != (mode is Mode.PATH):
        raise InvalidArgument("netns_path goes with mode path, and only with it", reason="BAD_MODE")
    if asked.netns_path and not _NAMESPACE_PATH.fullmatch(asked.netns_path):
        raise InvalidArgument(f"netns_path {asked.netns_path!r} is not an absolute path", reason="BAD_PATH")
    if asked.ports and mode is not Mode.NETWORKS:
        raise InvalidArgument(
            f"ports can be published in networks of their own only, not in mode {mode}: leave them out, or the mode",
            reason="BAD_MODE",
        )
    if asked.sysctls and not mode.has_own_namespace:
        raise InvalidArgument(f"mode {mode} takes no sysctls: the namespace belongs to others", reason="BAD_MODE")
    sysctls.paths(asked.sysctls)


def attachment(message: network_pb2.NetworkAttachment) -> Attachment:
    """One network as asked for. Raises InvalidArgument."""
    return Attachment(
        network=check_id(message.network, "network") if message.network else "",
        ipv4=str(subnets.parse_address(message.ipv4_address, "address", version=4)) if message.ipv4_address else "",
        ipv6=str(subnets.parse_address(message.ipv6_address, "address", version=6)) if message.ipv6_address else "",
        mac=subnets.parse_mac(message.mac_address) if message.mac_address else "",
        aliases=tuple(hostname(alias, "alias", MAX_DOMAIN) for alias in message.aliases),
        interface=subnets.check_interface_name(message.interface) if message.interface else "",
        receive_bps=_rate(message.receive_bps),
        send_bps=_rate(message.send_bps),
        routes=tuple(_route(one) for one in message.routes),
    )


def _rate(bits_per_s: int) -> int:
    if bits_per_s and not MIN_RATE_BPS <= bits_per_s <= MAX_RATE_BPS:
        raise InvalidArgument(
            f"a rate of {bits_per_s} bits per second is not between {MIN_RATE_BPS} and {MAX_RATE_BPS}",
            reason="BAD_RATE",
        )
    return bits_per_s


def _route(message: network_pb2.Route) -> tuple[str, str]:
    subnet = subnets.parse_subnet(message.destination, "destination of a route")
    gateway = subnets.parse_address(message.gateway, "gateway of a route", version=subnet.version)
    return str(subnet), str(gateway)


def ports(messages: Iterable[network_pb2.PortMapping]) -> tuple[Port, ...]:
    """Ports as asked for. Raises InvalidArgument."""
    found = tuple(_port(message) for message in messages)
    chosen = [port for port in found if port.is_chosen]
    if len({(port.protocol, port.host_port, port.host_ip) for port in chosen}) < len(chosen):
        raise InvalidArgument("a port of the host is named twice: it can lead to one port only", reason="BAD_PORT")
    return found


def _port(message: network_pb2.PortMapping) -> Port:
    protocol = message.protocol or "tcp"
    if protocol not in ("tcp", "udp", "sctp"):
        raise InvalidArgument(f"{protocol!r} is no protocol with ports: use tcp, udp or sctp", reason="BAD_PORT")
    if not 0 < message.container_port < 65536 or message.host_port >= 65536:
        raise InvalidArgument("ports are numbers from 1 to 65535", reason="BAD_PORT")
    first, last = message.host_port, message.host_port_last
    if last and not 0 < first <= last < 65536:
        raise InvalidArgument(f"ports {first}-{last} of the host are no range", reason="BAD_PORT")
    host_ip = str(subnets.parse_address(message.host_ip, "host address")) if message.host_ip else ""
    return Port(protocol, message.container_port, first, host_ip, last if last > first else 0)


def dns(message: network_pb2.DnsOptions) -> Dns:
    """Settings of resolv.conf. Raises InvalidArgument."""
    servers = tuple(str(subnets.parse_address(server, "name server")) for server in message.servers)
    return Dns(servers, _words(message.search, "search domain"), _words(message.options, "resolver option"))


def hostname(text: str, what: str, longest: int) -> str:
    """`text`, if it is empty or a host name. Raises InvalidArgument."""
    if text and (len(text) > longest or not _HOSTNAME.fullmatch(text)):
        raise InvalidArgument(
            f"{what} {text[: longest + 10]!r} is not valid: letters, digits, '-' and '.', at most {longest} characters",
            reason="BAD_HOSTNAME",
        )
    return text


def _words(words: Iterable[str], what: str) -> tuple[str, ...]:
    checked = tuple(words)
    for word in checked:
        if not _RESOLVER_WORD.fullmatch(word):
            raise InvalidArgument(f"{what} {word!r} is not valid", reason="BAD_DNS")
    return checked


def _host_entry(entry: network_pb2.HostEntry) -> tuple[str, str]:
    if not entry.name:
        raise InvalidArgument("an extra host needs a name", reason="BAD_HOSTNAME")
    name = hostname(entry.name, "host name", MAX_DOMAIN)
    if entry.address == HOST_GATEWAY:
        return name, HOST_GATEWAY
    return name, str(subnets.parse_address(entry.address, f"address of {name}"))


def endpoint(value: Endpoint, *, netns_path: str, files: str, own_hostname: str) -> network_pb2.Endpoint:
    """An endpoint as answered; `files` is the directory of its files."""
    answer = network_pb2.Endpoint(
        id=value.key.id,
        netns_path=netns_path,
        mode=_WIRE_MODES[value.mode],
        interfaces=[_interface(one, asked) for one, asked in zip(value.interfaces, attachments(value), strict=False)],
        hostname=own_hostname,
        hosts_path=f"{files}/{HOSTS}",
        resolv_conf_path=f"{files}/{RESOLV_CONF}",
        hostname_path=f"{files}/{HOSTNAME}",
        created_at=timestamp(value.created_ns),
        labels=dict(value.request.labels),
    )
    # Of a container with many, all are told for each that comes: messages one after the other are one message with all.
    answer.MergeFromString(b"".join(map(_with_port, value.ports)))
    return answer


@lru_cache(maxsize=4096)
def _with_port(port: Port) -> bytes:
    mapping = network_pb2.PortMapping(
        host_ip=port.host_ip, host_port=port.host_port, container_port=port.container_port, protocol=port.protocol
    )
    return network_pb2.Endpoint(ports=[mapping]).SerializeToString()


def _interface(value: Interface, asked: Attachment) -> network_pb2.Interface:
    message = network_pb2.Interface(
        network=value.network.name,
        name=value.name,
        host_name=value.host_name if value.network.is_bridge else "",
        mac_address=value.mac,
        aliases=value.aliases,
        receive_bps=asked.receive_bps,
        send_bps=asked.send_bps,
    )
    message.ipv4_address, message.ipv4_gateway = _address(value, 4)
    message.ipv6_address, message.ipv6_gateway = _address(value, 6)
    return message


def _address(value: Interface, version: int) -> tuple[str, str]:
    held = value.address(version)
    if held is None:
        return "", ""
    address, part = held
    has_none = value.network.internal or part.gateway == part.subnet.network_address
    gateway = "" if has_none else str(part.gateway)
    return f"{address}/{part.subnet.prefixlen}", gateway


def timestamp(nanoseconds: int) -> Timestamp:
    """A time on the wire."""
    seconds, nanos = divmod(nanoseconds, 1_000_000_000)
    return Timestamp(seconds=seconds, nanos=nanos)


def explained(step: Step) -> network_pb2.ExplainedStep:
    """A step of the way."""
    return network_pb2.ExplainedStep(where=step.where, verdict=_VERDICTS[step.verdict], says=step.says)


_VERDICTS: Mapping[Verdict, network_pb2.ExplainedStep.Verdict.ValueType] = {
    Verdict.PASSES: network_pb2.ExplainedStep.VERDICT_PASSES,
    Verdict.MAY_DROP: network_pb2.ExplainedStep.VERDICT_MAY_DROP,
    Verdict.DROPS: network_pb2.ExplainedStep.VERDICT_DROPS,
}
