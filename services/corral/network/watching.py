"""What others delete of ours in the kernel, as it tells: our nftables table or a part of it, links, addresses of links;
and what they change in iptables' chain FORWARD.

    NETLINK_NETFILTER   group NFNLGRP_NFTABLES       NFT_MSG_DEL…, and in FORWARD NFT_MSG_NEW…, but for those that a
                                                     socket of this process asked for
    NETLINK_ROUTE       RTNLGRP_LINK, …_IFADDR       RTM_DELLINK, RTM_DELADDR; a filter keeps all else from waking us

Reading is a function of bytes; what is done about it is in corral.network.restoring.

Source: netlink(7), rtnetlink(7), linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h, socket(7)
("SO_ATTACH_FILTER").
"""

import array
import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from corral.network import forwarding
from corral.network.links import name_of

NETLINK_NETFILTER = 12
_GROUP_NFTABLES = 7
_SUBSYSTEM_NFTABLES = 10
_DELETIONS = frozenset({2, 5, 8, 11, 14})  # of a table, chain, rule, set, element; each names its table first
_TABLE_NAME = 1
_NEW_CHAIN, _DELETED_CHAIN, _NEW_RULE, _DELETED_RULE, _DELETED_TABLE = 3, 5, 6, 8, 2
_CHAIN_NAME, _RULE_CHAIN = 3, 2
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_LINK_GROUPS = 0x1 | 0x10 | 0x100  # links, IPv4 addresses, IPv6 addresses
_RTM_DELLINK, _RTM_DELADDR = 17, 21
_IFLA_IFNAME = 3
_AF_BRIDGE = 7
_SO_ATTACH_FILTER = 26

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port of who asked for the change
_NETFILTER = struct.Struct("=BBH")
_LINK = struct.Struct("=BxHiII")  # family, device type, index, flags, which of them
_ADDR = struct.Struct("=BBBBI")  # family, prefix, flags, scope, index
_ATTRIBUTE = struct.Struct("=HH")
_FILTER = struct.Struct("=HBBI")  # an instruction of classic BPF
_FILTERS = struct.Struct("@HP")
_LOAD_HALF, _IF_EQUAL, _RETURN = 0x28, 0x15, 0x06
_BUFFER_BYTES = 1 << 20
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Lost:
    """What may be missing since somebody deleted something; `unknown`: events were lost, so anything may be."""

    rules: bool = False
    forward: bool = False  # iptables' chain FORWARD is not what it was
    links: frozenset[str] = frozenset()
    unknown: bool = False

    def __or__(self, other: Self) -> "Lost":
        return Lost(
            self.rules or other.rules,
            self.forward or other.forward,
            self.links | other.links,
            self.unknown or other.unknown,
        )

    def __bool__(self) -> bool:
        return self.rules or self.forward or bool(self.links) or self.unknown


NOTHING = Lost()


def lost_rules(data: bytes, table: str, own_ports: Collection[int]) -> bool:
    """Whether these messages of nftables tell that others deleted something of a table of ours. Pure."""
    for kind, port, body in _messages(data):
        if kind >> 8 != _SUBSYSTEM_NFTABLES or kind & 0xFF not in _DELETIONS or port in own_ports:
            continue
        name = dict(_attributes(body[_NETFILTER.size :])).get(_TABLE_NAME, b"")
        if body[:1] == _INET and name.rstrip(b"\0").decode("utf-8", "replace") == table:
            return True
    return False


_INET = b"\1"  # NFPROTO_INET
# And the attribute that names the chain.
_FORWARD_KINDS = {
    _DELETED_TABLE: 0,
    _NEW_CHAIN: _CHAIN_NAME,
    _DELETED_CHAIN: _CHAIN_NAME,
    _NEW_RULE: _RULE_CHAIN,
    _DELETED_RULE: _RULE_CHAIN,
}
_IP_FAMILIES = (b"\2", b"\12")  # NFPROTO_IPV4, NFPROTO_IPV6


def changed_forward(data: bytes, own_ports: Collection[int]) -> bool:
    """Whether these messages tell that others changed iptables' FORWARD. Pure."""
    for kind, port, body in _messages(data):
        kind, subsystem = kind & 0xFF, kind >> 8
        if subsystem != _SUBSYSTEM_NFTABLES or kind not in _FORWARD_KINDS or port in own_ports:
            continue
        named = dict(_attributes(body[_NETFILTER.size :]))
        if body[:1] not in _IP_FAMILIES or named.get(_TABLE_NAME, b"").rstrip(b"\0") != forwarding.TABLE.encode():
            continue
        where = named.get(_FORWARD_KINDS[kind], b"").rstrip(b"\0")
        if kind == _DELETED_TABLE or where == forwarding.CHAIN.encode():
            return True
    return False


def lost_links(data: bytes, name: Callable[[int], str]) -> frozenset[str]:
    """Names of links that these messages tell are gone, or have lost an address. Pure, but for `name` of an index.

    Only those that may be ours: others may be of any bytes.
    """
    found = set()
    for kind, _, body in _messages(data):
        if kind == _RTM_DELLINK and body[0] != _AF_BRIDGE:  # that one says only that it left its bridge
            found.add(
                dict(_attributes(body[_LINK.size :])).get(_IFLA_IFNAME, b"").rstrip(b"\0").decode("ascii", "replace")
            )
        elif kind == _RTM_DELADDR:
            *_, index = _ADDR.unpack_from(body)
            found.add(name(index))
    return frozenset(one for one in found if one and one.isascii())


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, port = _HEADER.unpack_from(data, at)
        yield kind, port, data[at + _HEADER.size : at + length]
        at += (max(length, _HEADER.size) + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & 0x3FFF, data[at + _ATTRIBUTE.size : at + length]
        at += (max(length, _ATTRIBUTE.size) + 3) & ~3


def own_netfilter_ports() -> frozenset[int]:
    """The netlink ports of this process's sockets of netfilter, libnftables' included."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if not entry.readlink().name.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as one:
                if one.family == socket.AF_NETLINK and one.proto == NETLINK_NETFILTER:
                    found.add(one.getsockname()[0])
    return frozenset(found)


class Watch:
    """The two sockets, in the network namespace of the thread that calls start(), read on its event loop."""

    def __init__(self, table: str, on_lost: Callable[[Lost], None]) -> None:
        self._table = table
        self._on_lost = on_lost
        self._own_ports: frozenset[int] = frozenset()
        self._sockets: list[socket.socket] = []

    def start(self) -> None:
        """Raises OSError; then nothing is watched."""
        loop = asyncio.get_running_loop()
        try:
            for made, read in ((_rules_socket(), self._read_rules), (_links_socket(), self._read_links)):
                self._sockets.append(made)
                loop.add_reader(made, self._drain, made, read)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        for one in self._sockets:
            asyncio.get_running_loop().remove_reader(one)
            one.close()
        self._sockets = []

    def _drain(self, one: socket.socket, read: Callable[[bytes], Lost]) -> None:
        lost = NOTHING
        messages = bytearray()
        while True:
            try:
                messages += one.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                lost |= Lost(unknown=True)  # more happened at once than the socket holds
        # All at once: whose they are costs a look at every file that is open.
        lost |= read(bytes(messages))
        if lost:
            self._on_lost(lost)

    def _read_rules(self, data: bytes) -> Lost:
        if not self._lost_rules(data):
            return NOTHING
        # libnftables opens its socket anew when it likes.
        self._own_ports = own_netfilter_ports()
        return self._lost_rules(data)

    def _lost_rules(self, data: bytes) -> Lost:
        return Lost(
            rules=lost_rules(data, self._table, self._own_ports),
            forward=changed_forward(data, self._own_ports),
        )

    def _read_links(self, data: bytes) -> Lost:
        return Lost(links=lost_links(data, name_of))


def _rules_socket() -> socket.socket:
    made = _socket(NETLINK_NETFILTER)
    try:
        made.bind((0, 0))
        made.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_NFTABLES)
    except OSError:
        made.close()
        raise
    return made


def _links_socket() -> socket.socket:
    made = _socket(socket.NETLINK_ROUTE)
    try:
        _only(made, _RTM_DELLINK, _RTM_DELADDR)
        made.bind((0, _LINK_GROUPS))
    except OSError:
        made.close()
        raise
    return made


def _socket(protocol: int) -> socket.socket:
    flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    made = socket.socket(socket.AF_NETLINK, flags, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    return made


def _only(one: socket.socket, first: int, second: int) -> None:
    """Let messages of two types through: the kernel sends one a datagram, and every new container makes a dozen."""
    swapped = [socket.htons(kind) for kind in (first, second)]  # the filter reads as from a network
    program = (
        (_LOAD_HALF, 0, 0, 4),
        (_IF_EQUAL, 1, 0, swapped[0]),
        (_IF_EQUAL, 0, 1, swapped[1]),
        (_RETURN, 0, 0, 0xFFFFFFFF),
        (_RETURN, 0, 0, 0),
    )
    code = array.array("B", b"".join(_FILTER.pack(*instruction) for instruction in program))
    address, _ = code.buffer_info()
    one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _FILTERS.pack(len(program), address))
