"""Links, addresses and routes as netlink messages: built here, sent through a Socket(NETLINK_ROUTE).

Source: rtnetlink(7), linux/if_link.h, linux/if_addr.h, linux/rtnetlink.h, linux/veth.h.
"""

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from corral.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, Socket, attribute, attributes, nested

NETLINK_ROUTE = 0

type Address = IPv4Address | IPv6Address
type Network = IPv4Network | IPv6Network

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26

_IFF_UP = 0x1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 4, 10, 18, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VETH_INFO_PEER = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x02
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE = 1, 4, 5, 15
_RT_TABLE_MAIN = 254
_RTPROT_STATIC = 4
_RT_SCOPE_UNIVERSE = 0

RT_TABLE_LOCAL = 255
RTN_UNICAST = 1

_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_U32 = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class Link:
    """A link as listed. master is the index of the bridge it is in, or 0."""

    index: int
    name: str
    kind: str
    master: int
    mtu: int


@dataclass(frozen=True, slots=True)
class Route:
    """A route as listed. No destination: a default route. oif is 0 where it has no single interface."""

    destination: Network | None
    oif: int
    table: int
    kind: int


# Links


def new_bridge(name: str, *, mac: str, mtu: int) -> Message:
    """A bridge, down, that keeps this MAC (else it takes that of its lowest port, and changes when ports come and
    go)."""
    body = b"".join((_ifinfo(), _name(name), _mac(mac), _number(_IFLA_MTU, mtu), _kind("bridge")))
    return Message(_RTM_NEWLINK, body, f"add bridge {name}", NLM_F_CREATE | NLM_F_EXCL)


def new_veth(name: str, *, master: int, mtu: int, peer: str, peer_netns: int, peer_mac: str) -> Message:
    """A veth pair: `name` here, up, in the bridge master; `peer`, down, in the namespace that the fd peer_netns
    names."""
    inner = (_ifinfo(), _name(peer), _mac(peer_mac), _number(_IFLA_MTU, mtu), _number(_IFLA_NET_NS_FD, peer_netns))
    info = nested(
        _IFLA_LINKINFO,
        attribute(_IFLA_INFO_KIND, b"veth"),
        nested(_IFLA_INFO_DATA, nested(_VETH_INFO_PEER, *inner)),
    )
    outer = (_ifinfo(up=True), _name(name), _number(_IFLA_MTU, mtu), _number(_IFLA_MASTER, master), info)
    return Message(_RTM_NEWLINK, b"".join(outer), f"add veth {name}", NLM_F_CREATE | NLM_F_EXCL)


def set_link(index: int, *, what: str, up: bool | None = None, master: int | None = None) -> Message:
    """Set a link up or down, and put it into a bridge (0: out of any)."""
    body = _ifinfo(index, up=up)
    if master is not None:
        body += _number(_IFLA_MASTER, master)
    return Message(_RTM_NEWLINK, body, what)


def delete_link(name: str) -> Message:
    """Delete a link; of a veth pair, both ends."""
    return Message(_RTM_DELLINK, _ifinfo() + _name(name), f"delete {name}")


def links(route_socket: Socket, kind: str = "") -> list[Link]:
    """All links, or those of a kind ("veth", "bridge", …)."""
    wanted = _kind(kind) if kind else b""
    found = []
    for body in route_socket.dump(Message(_RTM_GETLINK, _ifinfo() + wanted, f"list {kind} links".replace("  ", " "))):
        _, _, index, _, _ = _IFINFOMSG.unpack_from(body)
        given = attributes(body[_IFINFOMSG.size :])
        info = attributes(given.get(_IFLA_LINKINFO, b""))
        link = Link(
            index=index,
            name=_text(given[_IFLA_IFNAME]),
            kind=_text(info.get(_IFLA_INFO_KIND, b"")),
            master=_value(given.get(_IFLA_MASTER)),
            mtu=_value(given.get(_IFLA_MTU)),
        )
        if not kind or link.kind == kind:
            found.append(link)
    return found


# Addresses and routes


def new_address(index: int, address: Address, prefix_length: int, *, what: str) -> Message:
    """An address on a link. IPv6 ones are usable at once: without duplicate address detection, which takes a second."""
    flags = _IFA_F_NODAD if address.version == 6 else 0
    body = _IFADDRMSG.pack(_family(address), prefix_length, flags, _RT_SCOPE_UNIVERSE, index)
    body += attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)
    return Message(_RTM_NEWADDR, body, what, NLM_F_CREATE | NLM_F_EXCL)


def addresses(route_socket: Socket, index: int) -> list[tuple[Address, int]]:
    """The addresses of a link, each with its prefix length."""
    body = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    found = []
    for answer in route_socket.dump(Message(_RTM_GETADDR, body, "list addresses")):
        _, length, _, _, owner = _IFADDRMSG.unpack_from(answer)
        given = attributes(answer[_IFADDRMSG.size :])
        packed = given.get(_IFA_LOCAL) or given.get(_IFA_ADDRESS)
        if owner == index and packed is not None:
            found.append((ip_address(packed), length))
    return found


def new_default_route(gateway: Address, index: int) -> Message:
    """A default route through a gateway on a link."""
    body = _RTMSG.pack(_family(gateway), 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
    body += attribute(_RTA_GATEWAY, gateway.packed) + _number(_RTA_OIF, index)
    return Message(_RTM_NEWROUTE, body, f"add default route via {gateway}", NLM_F_CREATE | NLM_F_EXCL)


def routes(route_socket: Socket, families: Sequence[int] = (socket.AF_INET, socket.AF_INET6)) -> list[Route]:
    """The routes in all tables."""
    found = []
    for family in families:
        body = _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for answer in route_socket.dump(Message(_RTM_GETROUTE, body, "list routes")):
            _, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(answer)
            given = attributes(answer[_RTMSG.size :])
            destination = None
            if _RTA_DST in given:
                destination = ip_network((given[_RTA_DST], length), strict=False)
            found.append(Route(destination, _value(given.get(_RTA_OIF)), _value(given.get(_RTA_TABLE)) or table, kind))
    return found


# Encoding


def _ifinfo(index: int = 0, *, up: bool | None = None) -> bytes:
    """struct ifinfomsg; up=None leaves the flags alone."""
    flags, change = (_IFF_UP if up else 0), (0 if up is None else _IFF_UP)
    return _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, flags, change)


def _name(name: str) -> bytes:
    return attribute(_IFLA_IFNAME, name.encode() + b"\0")


def _mac(mac: str) -> bytes:
    return attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))


def _kind(kind: str) -> bytes:
    return nested(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, kind.encode()))


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, _U32.pack(value))


def _value(payload: bytes | None) -> int:
    return 0 if payload is None else int(_U32.unpack(payload)[0])


def _text(payload: bytes) -> str:
    return payload.rstrip(b"\0").decode("utf-8", "replace")


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6
