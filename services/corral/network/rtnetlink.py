"""The few rtnetlink requests that change something, packed by hand: one send for several, 10 us each.

pyroute2 takes 0.5 ms for each of them, most of what a container on a bridge costs here. What lists things stays with it
(see corral.network.netlink).

    request   nlmsghdr, family header, attributes      several in one datagram, done in order, each acknowledged
    answer    nlmsghdr, errno, the request's nlmsghdr, attributes (the kernel's own words)

Source: netlink(7), rtnetlink(7), linux/netlink.h, linux/if_link.h, linux/if_addr.h, linux/rtnetlink.h, linux/veth.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from corral.network.ipam import Address, Subnet
from corral.network.links import BridgePlan, InterfacePlan, PathTaken, SubLink, name_of

_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_REQUEST, _ACK, _REPLACE, _EXCL, _CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
_CHANGE = _REQUEST | _ACK
_MAKE = _CHANGE | _EXCL | _CREATE
_ERROR = 2
_ACK_TLVS = 0x200  # in an answer's flags
_MESSAGE_ATTRIBUTE = 1

_NEWLINK, _DELLINK, _SETLINK, _NEWADDR, _NEWROUTE, _GETROUTE, _NEWQDISC, _DELQDISC = 16, 17, 19, 20, 24, 26, 36, 37
_ADDRESS, _IFNAME, _MTU, _MASTER, _LINKINFO, _ALIAS, _NET_NS_FD = 1, 3, 4, 10, 18, 20, 28
_PROTINFO, _NESTED, _BRPORT_MODE, _BRPORT_ISOLATED = 12, 0x8000, 4, 33
_LOWER, _MACVLAN_MODE, _IPVLAN_MODE, _IPVLAN_FLAGS, _VLAN_ID = 5, 1, 1, 2, 1
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFF_UP = 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_NODAD = 1, 2, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _LOCAL = 1, 4, 5, 2
_TC_KIND, _TC_OPTIONS, _QDISC_ROOT, _QDISC_HANDLE = 1, 2, 0xFFFFFFFF, 1 << 16
_TBF_PARAMETERS, _TBF_RATE64, _TBF_BURST, _ETHERNET = 1, 4, 6, 1
_LARGEST_PACKET = 1 << 16
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL)
_TABLE_MAIN, _PROTOCOL_STATIC, _UNICAST, _SCOPE_LINK = 254, 4, 1, 253

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_LINK = struct.Struct("=BxHiII")  # family, device type, index, flags, which of them
_ADDR = struct.Struct("=BBBBI")  # family, prefix, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, prefixes, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_INTEGER = struct.Struct("=i")
_WORD = struct.Struct("=I")
_HALF = struct.Struct("=H")
_LONG = struct.Struct("=Q")
_QDISC = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_RATE = struct.Struct("=BBHhHI")  # cell, link layer, overhead, alignment, smallest packet, bytes per second
_TBF_REST = struct.Struct("=III")  # limit, buffer, mtu

_ANSWER_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Request:
    """One change; `what` says it in words."""

    kind: int
    flags: int
    body: bytes
    what: str


class Requests:
    """A socket for them, in the namespace of the thread that made it. For one thread at a time."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def path_to(self, address: Address) -> PathTaken | None:
        """The way that the kernel takes to an address; None if it has no route. Raises OSError."""
        head = _ROUTE.pack(_family(address), address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        self._sequence += 1
        question = Request(_GETROUTE, _REQUEST, head + _attribute(_RTA_DST, address.packed), f"find {address}")
        self._socket.send(_packed(question, self._sequence))
        answer = self._socket.recv(_ANSWER_BYTES)
        _, kind, *_ = _HEADER.unpack_from(answer)
        if kind == _ERROR:
            (error,) = _INTEGER.unpack_from(answer, _HEADER.size)
            if -error in _NO_ROUTE:
                return None
            raise _named(-error, "", question.what)
        return _path(answer[_HEADER.size :])

    def ask(self, *requests: Request) -> None:
        """Have a few requests done, in order; they are when this returns.

        Raises OSError for the first that failed, naming it. The others are not undone, and those after it were tried.
        """
        first = self._sequence + 1
        self._sequence += len(requests)
        self._socket.send(b"".join(_packed(request, first + i) for i, request in enumerate(requests)))
        failures: dict[int, OSError] = {}
        waiting = set(range(len(requests)))
        while waiting:
            for sequence, failure in _answers(self._socket.recv(_ANSWER_BYTES)):
                number = sequence - first
                if number in waiting:  # else to a request nobody waits for any more
                    waiting.remove(number)
                    if failure is not None:
                        failures[number] = _named(*failure, requests[number].what)
        if failures:
            raise failures[min(failures)]


def _packed(request: Request, sequence: int) -> bytes:
    length = _HEADER.size + len(request.body)
    return _HEADER.pack(length, request.kind, request.flags, sequence, 0) + request.body


def _answers(data: bytes) -> Iterator[tuple[int, tuple[int, str] | None]]:
    """The sequence number of each request that is answered, and its errno with the kernel's words if it failed."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if kind == _ERROR:
            (error,) = _INTEGER.unpack_from(data, at + _HEADER.size)
            words = _words(data[at + 2 * _HEADER.size + _INTEGER.size : at + length]) if flags & _ACK_TLVS else ""
            yield sequence, (-error, words) if error else None
        at += _aligned(max(length, _HEADER.size))


def _path(body: bytes) -> PathTaken:
    *_, kind, _ = _ROUTE.unpack_from(body)
    found: dict[int, bytes] = {}
    at = _ROUTE.size
    while at + _ATTRIBUTE.size <= len(body):
        length, which = _ATTRIBUTE.unpack_from(body, at)
        found[which] = body[at + _ATTRIBUTE.size : at + length]
        at += _aligned(max(length, _ATTRIBUTE.size))
    index = _WORD.unpack(found[_RTA_OIF])[0] if _RTA_OIF in found else 0
    gateway = ip_address(found[_RTA_GATEWAY]) if _RTA_GATEWAY in found else None
    return PathTaken(name_of(index), gateway, refused=kind not in (_UNICAST, _LOCAL))


def _words(attributes: bytes) -> str:
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if kind == _MESSAGE_ATTRIBUTE:
            return attributes[at + _ATTRIBUTE.size : at + length].rstrip(b"\0").decode("utf-8", "replace")
        at += _aligned(max(length, _ATTRIBUTE.size))
    return ""


def _named(code: int, words: str, what: str) -> OSError:
    reason = f"{os.strerror(code)} ({words})" if words else os.strerror(code)
    return OSError(code, f"netlink: {what}: {reason}")


def _aligned(length: int) -> int:
    return (length + 3) & ~3


# Requests


def new_bridge(plan: BridgePlan) -> Request:
    """A bridge, down, with a MAC of its own: else it takes that of its lowest port, which come and go."""
    body = (
        _link()
        + _name(plan.owner.birth_name)
        + _mac(plan.mac)
        + (_mtu(plan.mtu) if plan.mtu else b"")
        + _info("bridge")
    )
    return Request(_NEWLINK, _MAKE, body, f"add bridge {plan.name}")


def new_veth(plan: InterfacePlan, master: int, netns_fd: int) -> Request:
    """A veth pair: the host's end up and on a bridge, the other in a namespace."""
    netns = _attribute(_NET_NS_FD, _WORD.pack(netns_fd))
    peer = _link() + _name(plan.name) + _mac(plan.mac) + _mtu(plan.mtu) + netns
    own = _name(plan.host_name) + _mtu(plan.mtu) + _attribute(_MASTER, _WORD.pack(master))
    body = _link(up=True) + own + _info("veth", _attribute(_VETH_PEER, peer))
    return Request(_NEWLINK, _MAKE, body, f"add veth {plan.host_name} to {plan.bridge}")


def new_sublink(plan: InterfacePlan, kind: SubLink, parent: int, netns_fd: int) -> Request:
    """A macvlan or ipvlan link of a parent, in a namespace."""
    mac = _mac(plan.mac) if plan.mac else b""
    mtu = _mtu(plan.mtu) if plan.mtu else b""
    netns = _attribute(_NET_NS_FD, _WORD.pack(netns_fd))
    if kind.kind == "macvlan":
        data = _attribute(_MACVLAN_MODE, _WORD.pack(kind.mode))
    else:
        data = _attribute(_IPVLAN_MODE, _HALF.pack(kind.mode)) + _attribute(_IPVLAN_FLAGS, _HALF.pack(kind.flags))
    body = _link() + _name(plan.name) + mac + mtu + _attribute(_LOWER, _WORD.pack(parent)) + netns
    return Request(_NEWLINK, _MAKE, body + _info(kind.kind, data), f"add {kind.kind} {plan.name} to {plan.bridge}")


def new_cable(name: str, peer: str) -> Request:
    """A veth pair with both ends here. A link has a carrier only while its other end is up."""
    ends = _attribute(_VETH_PEER, _link() + _name(peer))
    return Request(_NEWLINK, _MAKE, _link() + _name(name) + _info("veth", ends), f"add veth {name} to {peer}")


def new_vlan(name: str, parent: int, tag: int) -> Request:
    """A tagged network on a link, down."""
    body = _link() + _name(name) + _attribute(_LOWER, _WORD.pack(parent))
    return Request(_NEWLINK, _MAKE, body + _info("vlan", _attribute(_VLAN_ID, _HALF.pack(tag))), f"add VLAN {name}")


def isolate(index: int, what: str) -> Request:
    """Let the bridge pass no frame between this end and others that are isolated."""
    head = _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0)
    body = head + _attribute(_PROTINFO | _NESTED, _attribute(_BRPORT_ISOLATED, b"\1"))
    return Request(_SETLINK, _CHANGE, body, what)


def route_by_link(version: int, index: int) -> Request:
    """A default route without a gateway."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    scope = _SCOPE_LINK if version == 4 else 0
    head = _ROUTE.pack(family, 0, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, scope, _UNICAST, 0)
    body = head + _attribute(_RTA_OIF, _WORD.pack(index))
    return Request(_NEWROUTE, _CHANGE | _CREATE | _REPLACE, body, "set default route through the link")


def limit_rate(index: int, bits_per_s: int, what: str) -> Request:
    """Let a link send so much and no more: a token bucket, with a queue of 50 ms. Source: tc-tbf(8), linux/pkt_sched.h.

    A burst holds 10 ms, and at least the largest packet that is not cut into pieces yet.
    """
    rate = max(bits_per_s // 8, 1)
    burst = max(rate // 100, _LARGEST_PACKET)
    queue = min(burst + rate // 20, 0xFFFFFFFF)
    speed = _RATE.pack(0, _ETHERNET, 0, 0, 0, min(rate, 0xFFFFFFFF))
    parameters = _attribute(_TBF_PARAMETERS, speed + bytes(_RATE.size) + _TBF_REST.pack(queue, 0, 0))
    options = parameters + _attribute(_TBF_RATE64, _LONG.pack(rate)) + _attribute(_TBF_BURST, _WORD.pack(burst))
    head = _QDISC.pack(0, index, _QDISC_HANDLE, _QDISC_ROOT, 0)
    body = head + _attribute(_TC_KIND, b"tbf\0") + _attribute(_TC_OPTIONS, options)
    return Request(_NEWQDISC, _CHANGE | _CREATE | _REPLACE, body, what)


def lift_rate(index: int, what: str) -> Request:
    """Take that limit away. The kernel says ENOENT or EINVAL where there is none."""
    return Request(_DELQDISC, _CHANGE, _QDISC.pack(0, index, _QDISC_HANDLE, _QDISC_ROOT, 0), what)


def route(subnet: Subnet, gateway: Address, index: int) -> Request:
    """A route by a gateway, in the place of another one."""
    head = _ROUTE.pack(_family(gateway), subnet.prefixlen, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, 0, _UNICAST, 0)
    own = _attribute(_RTA_DST, subnet.network_address.packed) + _attribute(_RTA_GATEWAY, gateway.packed)
    body = head + own + _attribute(_RTA_OIF, _WORD.pack(index))
    return Request(_NEWROUTE, _CHANGE | _CREATE | _REPLACE, body, f"set route to {subnet} via {gateway}")


def set_link(index: int, *, up: bool, what: str, master: int | None = None) -> Request:
    """Set a link up or down, and put it into a bridge (0: out of any)."""
    into = b"" if master is None else _attribute(_MASTER, _WORD.pack(master))
    return Request(_NEWLINK, _CHANGE, _link(index, up=up) + into, what)


def rename(index: int, name: str, alias: str = "") -> Request:
    """Give a link that is down another name, and an alias."""
    body = _link(index) + _name(name) + (_attribute(_ALIAS, alias.encode()) if alias else b"")
    return Request(_NEWLINK, _CHANGE, body, f"name a link {name}")


def reflect(index: int, what: str) -> Request:
    """Let the bridge send a frame out of the port it came from ("hairpin mode")."""
    head = _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0)
    body = head + _attribute(_PROTINFO | _NESTED, _attribute(_BRPORT_MODE, b"\1"))
    return Request(_SETLINK, _CHANGE, body, what)


def delete_link(name: str) -> Request:
    return Request(_DELLINK, _CHANGE, _link() + _name(name), f"delete {name}")


def new_address(index: int, address: Address, length: int, where: str) -> Request:
    """An address on a link. Ours are unique by allocation; duplicate address detection would keep IPv6 ones unusable
    for a second."""
    flags = _IFA_NODAD if address.version == 6 else 0
    own = _attribute(_IFA_LOCAL, address.packed) + _attribute(_IFA_ADDRESS, address.packed)
    body = _ADDR.pack(_family(address), length, flags, 0, index) + own
    return Request(_NEWADDR, _MAKE, body, f"add address {address}/{length} to {where}")


def default_route(gateway: Address, index: int) -> Request:
    """In the place of another one, where there is one."""
    head = _ROUTE.pack(_family(gateway), 0, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, 0, _UNICAST, 0)
    body = head + _attribute(_RTA_GATEWAY, gateway.packed) + _attribute(_RTA_OIF, _WORD.pack(index))
    return Request(_NEWROUTE, _CHANGE | _CREATE | _REPLACE, body, f"set default route via {gateway}")


def _link(index: int = 0, *, up: bool | None = None) -> bytes:
    """The head of a message about a link; up=None leaves its flags alone."""
    return _LINK.pack(0, 0, index, _IFF_UP if up else 0, 0 if up is None else _IFF_UP)


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length & 3)


def _name(name: str) -> bytes:
    return _attribute(_IFNAME, name.encode() + b"\0")


def _mac(mac: str) -> bytes:
    return _attribute(_ADDRESS, bytes.fromhex(mac.replace(":", "")))


def _mtu(mtu: int) -> bytes:
    return _attribute(_MTU, _WORD.pack(mtu))


def _info(kind: str, data: bytes = b"") -> bytes:
    own = _attribute(_INFO_KIND, kind.encode() + b"\0")
    return _attribute(_LINKINFO, own + (_attribute(_INFO_DATA, data) if data else b""))


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6
