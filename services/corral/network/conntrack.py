"""Connections that the kernel tracks are forgotten, so that those which go on are looked at anew.

A flow of datagrams has no end: it would go on to where a port led when it began, be that nobody, or a container whose
address is another's by now. Forgotten by the kernel, its next datagram is treated as its first.

    IPCTNL_MSG_CT_DELETE  CTA_TUPLE_ORIG | CTA_TUPLE_REPLY: what to look for, CTA_FILTER: which parts of that count

Source: linux/netfilter/nfnetlink_conntrack.h; a filter is taken since Linux 6.11, and older kernels forget nothing.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable

import structlog

from corral.network.ipam import Address
from corral.network.model import Forward

log = structlog.get_logger()

_NETLINK_NETFILTER = 12
_DELETE = 1 << 8 | 2
_REQUEST_ACK = 5
_ORIG, _REPLY, _FILTER = 1, 2, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC = {4: 1, 6: 3}
_PROTO_NUM, _PROTO_DST_PORT = 1, 3
_FILTER_ORIG, _FILTER_REPLY = 1, 2
_COUNTS_SRC, _COUNTS_NUM, _COUNTS_DST_PORT = 1 << 0, 1 << 3, 1 << 5
_NESTED = 0x8000
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}
_HEADER = struct.Struct("=IHHIIBBH")  # of netlink, then of netfilter
_ATTRIBUTE = struct.Struct("=HH")
_ANSWER = struct.Struct("=IHHIIi")


def forget_ports(ports: Iterable[Forward]) -> None:
    """What comes for these ports is looked at anew. In the calling thread's network namespace; no error."""
    wanted = {(port.address.version, port.protocol, port.host_port) for port in ports}
    for version, protocol, number in wanted:
        proto = _attribute(_PROTO_NUM, bytes([_NUMBERS[protocol]])) + _attribute(_PROTO_DST_PORT, number.to_bytes(2))
        _forget(version, _ORIG, _attribute(_TUPLE_PROTO | _NESTED, proto), _COUNTS_NUM | _COUNTS_DST_PORT)


def forget_address(address: Address) -> None:
    """So is what goes to a container's address; no error."""
    own = _attribute(_IP_SRC[address.version], address.packed)
    _forget(address.version, _REPLY, _attribute(_TUPLE_IP | _NESTED, own), _COUNTS_SRC)


def _forget(version: int, which: int, match: bytes, counts: int) -> None:
    flags = _attribute(_FILTER_ORIG, struct.pack("=I", counts if which == _ORIG else 0))
    flags += _attribute(_FILTER_REPLY, struct.pack("=I", counts if which == _REPLY else 0))
    body = _attribute(which | _NESTED, match) + _attribute(_FILTER | _NESTED, flags)
    header = _HEADER.pack(_HEADER.size + len(body), _DELETE, _REQUEST_ACK, 1, 0, _FAMILY[version], 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
            netlink.send(header + body)
            *_, code = _ANSWER.unpack_from(netlink.recv(4096))
    except OSError as e:
        code = -(e.errno or errno.EIO)
    if code and -code != errno.ENOENT:
        log.debug("conntrack.not_forgotten", error=os.strerror(-code))


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length & 3)
