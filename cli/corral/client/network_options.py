"""The networks of a container, from the words people use: "web,alias=db", "8080:80/udp", "name:10.0.0.1"."""

import re
from collections.abc import Iterable, Sequence
from typing import TypedDict

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.network.v1 import network_pb2


class NetworkOptions(TypedDict, total=False):
    """What a container asks of its networks."""

    # bridge, host, none, container:ID, ns:/path or a network's name. Or several networks, each also as
    # "name=web,alias=db,ip=10.1.0.7,mac-address=…,interface-name=eth0".
    network: str | Sequence[str]
    network_aliases: Sequence[str]  # in the first network
    ip: str  # likewise, of either version
    ip6: str
    mac_address: str
    net_rate: str  # bits per second in each network, "100m", or received and sent, "100m/20m"
    ports: Sequence[str]  # "[ip:][host:]container[/protocol]"
    publish_all: bool  # those that the image exposes
    dns: Sequence[str]
    dns_search: Sequence[str]
    dns_options: Sequence[str]
    extra_hosts: Sequence[str]  # "name:address"


_FIELDS = {
    "name": "network",
    "alias": "aliases",
    "ip": "ipv4_address",
    "ip6": "ipv6_address",
    "mac-address": "mac_address",
    "interface-name": "interface",
    "rate": "",
    "route": "",
}
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)(?:bit)?", re.IGNORECASE)
_RATE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def network_config(o: NetworkOptions) -> pb.NetworkConfig | None:
    """The message for these options; None where they ask for nothing. Raises ValueError."""
    wanted = o.get("network", "")
    attachments = [attachment(text) for text in ([wanted] if isinstance(wanted, str) else wanted)]
    config = pb.NetworkConfig(
        mode=attachments[0].network if attachments else "",
        publish_all=o.get("publish_all", False),
        ports=[mapping for p in o.get("ports", ()) for mapping in port(p)],
        extra_hosts=[_host_entry(h) for h in o.get("extra_hosts", ())],
    )
    first = attachments[0] if attachments else network_pb2.NetworkAttachment()
    first.aliases.extend(o.get("network_aliases", ()))
    first.mac_address = o.get("mac_address", "") or first.mac_address
    if rate := o.get("net_rate", ""):
        for each in attachments or [first]:
            limit(each, rate)
    for ip in filter(None, (o.get("ip", ""), o.get("ip6", ""))):
        setattr(first, "ipv6_address" if ":" in ip else "ipv4_address", ip)
    if len(attachments) > 1 or first != network_pb2.NetworkAttachment(network=config.mode):
        config.attachments.extend([first, *attachments[1:]])
    dns = network_pb2.DnsOptions(
        servers=o.get("dns", ()), search=o.get("dns_search", ()), options=o.get("dns_options", ())
    )
    if dns.ByteSize():
        config.dns.CopyFrom(dns)
    return config if config.ByteSize() else None


def attachment(text: str) -> network_pb2.NetworkAttachment:
    """A network in docker's --network form: its name or mode, or name=NAME and what else is asked of it."""
    found = network_pb2.NetworkAttachment()
    if "=" not in text or text.startswith(("container:", "ns:")):
        found.network = text
        return found
    for part in text.split(","):
        key, _, value = part.partition("=")
        field = _FIELDS.get(key)
        if field is None or not value:
            known = ", ".join(f"{name}=" for name in _FIELDS)
            raise ValueError(f"network {text!r} is not understood: give a name, or {known} separated by commas")
        if field == "aliases":
            found.aliases.append(value)
        elif key == "rate":
            limit(found, value)
        elif key == "route":
            destination, _, gateway = value.partition("@")
            found.routes.add(destination=destination, gateway=gateway)
        else:
            setattr(found, field, value)
    if not found.network:
        raise ValueError(f"network {text!r} has no name=")
    return found


def limit(found: network_pb2.NetworkAttachment, rate: str) -> None:
    """Limit an attachment to "100m", or what it receives and sends to "100m/20m". Raises ValueError."""
    found.receive_bps, found.send_bps = rates_bps(rate)


def rates_bps(text: str) -> tuple[int, int]:
    """What "100m", or "100m/20m", lets be received and sent, in bits per second. Raises ValueError."""
    received, _, sent = text.partition("/")
    return rate_bps(received), rate_bps(sent or received)


def rate_bps(text: str) -> int:
    """Bits per second of "100m", "1.5g", "64kbit"; units are powers of 1000, as tc has them. Raises ValueError."""
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"rate {text!r} is not understood: give bits per second, such as 100m, or 100m/20m")
    return int(float(match[1]) * _RATE_UNITS[match[2].lower()])


def port(text: str) -> list[network_pb2.PortMapping]:
    """Published ports: [IP:][HOST:]CONTAINER[/PROTOCOL], where HOST and CONTAINER may be ranges of one length.

    As with docker HOST may be 0, one that is free, and a range for one CONTAINER: the first of it that is free.
    """
    body, _, protocol = text.partition("/")
    head, _, container = body.rpartition(":")
    ip, _, host = head.rpartition(":") if head.count(":") else ("", "", head)
    try:
        inner = _port_range(container)
        chosen = host.strip("0") == ""
        outer = range(len(inner)) if chosen else _port_range(host)
    except ValueError:
        chosen, outer, inner = False, range(0), range(1)
    if len(inner) == 1 < len(outer) and protocol in ("", "tcp", "udp", "sctp"):
        return [
            network_pb2.PortMapping(
                host_ip=ip.strip("[]"), host_port=outer[0], host_port_last=outer[-1], container_port=inner[0],
                protocol=protocol or "tcp",
            )
        ]  # fmt: skip
    if len(outer) != len(inner) or protocol not in ("", "tcp", "udp", "sctp"):
        raise ValueError(f"port {text!r} is not understood: give [IP:][HOST:]CONTAINER[/tcp|udp|sctp]")
    return [
        network_pb2.PortMapping(
            host_ip=ip.strip("[]"), host_port=0 if chosen else h, container_port=c, protocol=protocol or "tcp"
        )
        for h, c in zip(outer, inner, strict=True)
    ]


def ports_request(container: str, ports: Iterable[str]) -> pb.ContainerPortsRequest:
    """These ports of a container. Raises ValueError."""
    return pb.ContainerPortsRequest(container=container, ports=[mapping for text in ports for mapping in port(text)])


def _port_range(text: str) -> range:
    first, _, last = text.partition("-")
    ports = range(int(first), int(last or first) + 1)
    if not ports or ports[0] < 1 or ports[-1] > 65535:
        raise ValueError(text)
    return ports


def _host_entry(text: str) -> network_pb2.HostEntry:
    name, _, address = text.partition(":")
    if not name or not address:
        raise ValueError(f"host {text!r} is not understood: give NAME:ADDRESS")
    return network_pb2.HostEntry(name=name, address=address.strip("[]"))
