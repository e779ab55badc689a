"""Ports as a container's config asks for them, and as its endpoint has them. Pure.

A config names the container's port, and the host's where somebody chose that; an endpoint has the numbers of all.
"""

from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from corral.api.engine.v1.engine_pb2 import ContainerConfig
from corral.api.network.v1.network_pb2 import Endpoint, PortMapping
from corral.engine.records import ContainerRecord
from corral.rpc.errors import AlreadyExists, InvalidArgument

PROTOCOLS = ("tcp", "udp", "sctp")
_ALL_ADDRESSES = ("", "0.0.0.0", "::")


def checked(ports: Iterable[PortMapping]) -> list[PortMapping]:
    """With what is left out filled in. Raises InvalidArgument."""
    found = []
    for port in ports:
        filled = PortMapping(
            host_ip=_address(port),
            host_port=port.host_port,
            container_port=port.container_port,
            protocol=port.protocol or "tcp",
            host_port_last=port.host_port_last if port.host_port_last != port.host_port else 0,
        )
        if filled.protocol not in PROTOCOLS:
            raise InvalidArgument(
                f"{filled.protocol!r} is no protocol with ports: use tcp, udp or sctp", reason="BAD_PORT"
            )
        if not 0 < filled.container_port < 65536 or filled.host_port >= 65536:
            raise InvalidArgument("ports are numbers from 1 to 65535", reason="BAD_PORT")
        if filled.host_port_last and not 0 < filled.host_port < filled.host_port_last < 65536:
            raise InvalidArgument(
                f"ports {filled.host_port}-{filled.host_port_last} of the host are no range", reason="BAD_PORT"
            )
        if filled not in found:
            found.append(filled)
    if not found:
        raise InvalidArgument("no port is named", reason="BAD_PORT")
    return found


def means(asked: PortMapping, published: PortMapping) -> bool:
    """Whether one that is asked for, or named, is this published one."""
    return (
        asked.container_port == published.container_port
        and (asked.protocol or "tcp") == (published.protocol or "tcp")
        and (not asked.host_ip or _address(asked) == _address(published))
        and (asked == published or _allows(asked, published.host_port))
    )


def _allows(asked: PortMapping, host_port: int) -> bool:
    return not asked.host_port or asked.host_port <= host_port <= (asked.host_port_last or asked.host_port)


def range_of(record: ContainerRecord, published: PortMapping) -> PortMapping | None:
    """The range that its config asks for, of which this is one; None if it was not chosen that way."""
    asked = record.config.network.ports
    return next((one for one in asked if one.host_port_last and _is(one, published)), None)


def _address(port: PortMapping) -> str:
    """In the one form that the network leaf has it in. Raises InvalidArgument."""
    try:
        return str(ip_address(port.host_ip)) if port.host_ip else ""
    except ValueError as e:
        raise InvalidArgument(f"{port.host_ip!r} is no address of this host", reason="BAD_ADDRESS") from e


def _is(asked: PortMapping, published: PortMapping) -> bool:
    return means(asked, published) and bool(asked.host_ip) == bool(published.host_ip)


def published_by(record: ContainerRecord) -> list[PortMapping]:
    """What the endpoint has, or will have with the next start."""
    return [] if record.endpoint is None else list(record.endpoint.ports)


def refuse_taken(name: str, published: Sequence[PortMapping], lacking: Sequence[PortMapping]) -> None:
    """Raises AlreadyExists for a port of the host that leads to another of the same container's."""
    seen = list(published)
    for port in lacking:
        for other in seen:
            if port.host_port and _overlap(port, other):
                raise AlreadyExists(
                    f"port {port.host_port}/{port.protocol} of the host leads to port {other.container_port} of"
                    f" container {name} already: choose another one, or remove that",
                    reason="PORT_TAKEN",
                )
        seen.append(port)


def _overlap(one: PortMapping, other: PortMapping) -> bool:
    if one.host_port_last or other.host_port_last:
        return False  # it will be one that is free
    if (one.protocol, one.host_port) != (other.protocol or "tcp", other.host_port):
        return False
    if "" in (one.host_ip, other.host_ip) or one.host_ip == other.host_ip:
        return True
    same_version = (":" in one.host_ip) == (":" in other.host_ip)
    return same_version and (one.host_ip in _ALL_ADDRESSES or other.host_ip in _ALL_ADDRESSES)


def told(port: PortMapping) -> str:
    """As it is typed: [IP:][HOST:]CONTAINER/PROTOCOL."""
    address = f"[{port.host_ip}]:" if ":" in port.host_ip else f"{port.host_ip}:" if port.host_ip else ""
    last = f"-{port.host_port_last}" if port.host_port_last else ""
    host = f"{port.host_port or ''}{last}:" if port.host_port or address else ""
    return f"{address}{host}{port.container_port}/{port.protocol or 'tcp'}"


def _leads_alike(one: PortMapping, other: PortMapping) -> bool:
    kind = (other.container_port, other.protocol or "tcp", _address(other))
    return (one.container_port, one.protocol or "tcp", _address(one)) == kind


def with_ports(
    record: ContainerRecord, published: Iterable[PortMapping], more: Iterable[PortMapping] = ()
) -> ContainerConfig:
    """Its config with these ports of the endpoint and more; what publish_all had stood for is named from now on."""
    new = ContainerConfig()
    new.CopyFrom(record.config)
    del new.network.ports[:]
    new.network.publish_all = False
    new.network.ports.extend([*(_as_asked(record, one) for one in published), *more])
    return new


def _as_asked(record: ContainerRecord, published: PortMapping) -> PortMapping:
    """As a config names it: without its number, if nobody chose that, and it can be taken for no other."""
    if any(one.host_port and not one.host_port_last and _is(one, published) for one in record.config.network.ports):
        return published
    if (asked := range_of(record, published)) is not None:
        return asked
    if any(one != published and _leads_alike(one, published) for one in published_by(record)):
        return published
    return PortMapping(
        host_ip=published.host_ip,
        container_port=published.container_port,
        protocol=published.protocol,
    )


def with_these(endpoint: Endpoint, ports: Iterable[PortMapping]) -> Endpoint:
    """The endpoint of a container that does not run, as its next start is to make it."""
    new = Endpoint()
    new.CopyFrom(endpoint)
    wanted = list(ports)
    del new.ports[:]
    new.ports.extend(wanted)
    return new


def missing(record: ContainerRecord) -> list[PortMapping]:
    """What the config asks for and the endpoint has not."""
    published = published_by(record)
    return [port for port in record.config.network.ports if not any(_is(port, one) for one in published)]


def superfluous(record: ContainerRecord) -> list[PortMapping]:
    """What the endpoint has and the config does not ask for; with publish_all it may be the image that does."""
    if record.config.network.publish_all:
        return []
    asked = record.config.network.ports
    return [one for one in published_by(record) if not any(_is(port, one) for port in asked)]


def agree(record: ContainerRecord) -> bool:
    """Whether the endpoint of a container publishes what its config asks for."""
    return record.endpoint is None or not (missing(record) or superfluous(record))
