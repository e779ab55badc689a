"""Connections that the kernel tracks are forgotten, so that those which go on are looked at anew.

A flow of datagrams has no end: it would go on to where a port led when it began, be that nobody, or a container whose
address is another's by now. Forgotten by the kernel, its next datagram is treated as its first. A port's number alone
says nothing: what containers have begun with servers elsewhere has the same, and would be cut.

    IPCTNL_MSG_CT_DELETE  CTA_TUPLE_ORIG | CTA_TUPLE_REPLY: what to look for, CTA_FILTER: which parts of that count
    IPCTNL_MSG_CT_GET     likewise, for a list; each of which can be deleted by its CTA_TUPLE_ORIG and CTA_ID

Source: linux/netfilter/nfnetlink_conntrack.h; lists take a filter since Linux 5.8, deletion since 6.11: before that
nothing is forgotten of containers that are gone.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from ipaddress import ip_address

import structlog

from corral.network.ipam import Address
from corral.network.model import ANY_HOST_IPS, Forward

log = structlog.get_logger()

_NETLINK_NETFILTER = 12
_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_ERROR, _DONE = 2, 3
_REQUEST_ACK, _REQUEST_DUMP = 5, 0x301
_ORIG, _REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC, _IP_DST = {4: 1, 6: 3}, {4: 2, 6: 4}
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_FILTER_ORIG, _FILTER_REPLY = 1, 2
_COUNTS_SRC, _COUNTS_DST, _COUNTS_NUM, _COUNTS_SRC_PORT, _COUNTS_DST_PORT = 1, 1 << 1, 1 << 3, 1 << 4, 1 << 5
_NESTED, _KIND = 0x8000, 0x3FFF
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}
_HEADER = struct.Struct("=IHHIIBBH")  # of netlink, then of netfilter
_NETLINK = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_CODE = struct.Struct("=i")
_LONGEST = 1 << 16

type _Tuple = tuple[bytes, int]
"""What a direction of a connection is to be like, and which parts of that count."""
_ANY: _Tuple = (b"", 0)


class Conntrack:
    """What is tracked in the network namespace of the thread that asks first. For one thread at a time.

    Its socket stays open: closing one of this protocol waits until nftables has destroyed what the last transaction
    took out, which is a grace period of RCU and takes ten milliseconds and more.
    Source: Linux nf_tables_api.c, nft_rcv_nl_event().
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def forget_ways(self, ports: Iterable[Forward]) -> None:
        """What came by these ports to their containers leads there no more; no error."""
        for port in ports:
            version = port.address.version
            orig = _proto(port.protocol, _PROTO_DST_PORT, port.host_port)
            if port.host_ip not in ANY_HOST_IPS:  # another's address may have the same port, and lead there as well
                orig = _both(_ip(_IP_DST, ip_address(port.host_ip)), orig)
            reply = _both(_ip(_IP_SRC, port.address), _proto(port.protocol, _PROTO_SRC_PORT, port.container_port))
            self._ask(_request(_DELETE, _REQUEST_ACK, version, _matching(orig, reply)))

    def forget_strays(self, ports: Iterable[Forward], own: Callable[[], Collection[Address]]) -> None:
        """Datagrams that this host was sent before these ports led anywhere follow them from now on; no error.

        Other protocols begin a connection when it is tried again. own: the addresses of this host.
        """
        own = cache(own)
        for port in ports:
            if port.protocol == "udp":
                version = port.address.version
                number = _proto(port.protocol, _PROTO_DST_PORT, port.host_port)
                for flow in self._ask(_request(_GET, _REQUEST_DUMP, version, _matching(number, _ANY))):
                    if _is_for(port, _destination(flow, version), own):
                        self._forget(version, flow)

    def _forget(self, version: int, flow: Mapping[int, bytes]) -> None:
        known = ((_ORIG, _NESTED), (_ZONE, 0), (_ID, 0))
        body = b"".join(_attribute(kind | flag, flow[kind]) for kind, flag in known if kind in flow)
        self._ask(_request(_DELETE, _REQUEST_ACK, version, body))

    def forget_address(self, address: Address) -> None:
        """What goes to a container's address is looked at anew; no error."""
        match = _matching(_ANY, _ip(_IP_SRC, address))
        self._ask(_request(_DELETE, _REQUEST_ACK, address.version, match))

    def close(self) -> None:
        """Harmless when repeated."""
        netlink, self._socket = self._socket, None
        if netlink is not None:
            netlink.close()

    def _ask(self, request: bytes) -> Iterable[Mapping[int, bytes]]:
        """Returns the attributes of what is listed."""
        found: list[bytes] = []
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
            self._socket.send(request)
            while (code := _read(self._socket.recv(_LONGEST), found)) is None:
                pass
        except OSError as e:
            self.close()  # an answer that comes late would be taken for the next one's
            code = -(e.errno or errno.EIO)
        if code and -code != errno.ENOENT:
            log.debug("conntrack.not_forgotten", error=os.strerror(-code))
        return [_attributes(each) for each in found]


def _is_for(port: Forward, destination: Address, own: Callable[[], Collection[Address]]) -> bool:
    if port.host_ip not in ANY_HOST_IPS:
        return destination == ip_address(port.host_ip)
    return destination.is_loopback or destination in own()


def _destination(flow: Mapping[int, bytes], version: int) -> Address:
    return ip_address(_attributes(_attributes(flow[_ORIG])[_TUPLE_IP])[_IP_DST[version]])


def _ip(role: Mapping[int, int], address: Address) -> _Tuple:
    own = _attribute(role[address.version], address.packed)
    return _attribute(_TUPLE_IP | _NESTED, own), _COUNTS_SRC if role is _IP_SRC else _COUNTS_DST


def _proto(protocol: str, role: int, port: int) -> _Tuple:
    own = _attribute(_PROTO_NUM, bytes([_NUMBERS[protocol]])) + _attribute(role, port.to_bytes(2))
    counts = _COUNTS_SRC_PORT if role == _PROTO_SRC_PORT else _COUNTS_DST_PORT
    return _attribute(_TUPLE_PROTO | _NESTED, own), _COUNTS_NUM | counts


def _both(one: _Tuple, other: _Tuple) -> _Tuple:
    return one[0] + other[0], one[1] | other[1]


def _matching(orig: _Tuple, reply: _Tuple) -> bytes:
    tuples = ((_ORIG, *orig), (_REPLY, *reply))
    body = b"".join(_attribute(which | _NESTED, match) for which, match, counts in tuples if counts)
    flags = _attribute(_FILTER_ORIG, struct.pack("=I", orig[1])) + _attribute(
        _FILTER_REPLY, struct.pack("=I", reply[1])
    )
    return body + _attribute(_FILTER | _NESTED, flags)


def _request(kind: int, flags: int, version: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0, _FAMILY[version], 1, 0) + body


def _read(data: bytes, found: list[bytes]) -> int | None:
    """Adds what a datagram lists; returns the code that the answer ends with, None while more is to come."""
    at = 0
    while at < len(data):
        length, kind, *_ = _NETLINK.unpack_from(data, at)
        if kind in (_ERROR, _DONE):
            return int(_CODE.unpack_from(data, at + _NETLINK.size)[0])
        found.append(data[at + _HEADER.size : at + length])
        at += length + (-length & 3)
    return None


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length & 3)


def _attributes(data: bytes) -> Mapping[int, bytes]:
    found, at = {}, 0
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind & _KIND] = data[at + _ATTRIBUTE.size : at + length]
        at += length + (-length & 3)
    return found
