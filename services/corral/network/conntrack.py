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


class Conntrack:
    """What is tracked in the network namespace of the thread that asks first. For one thread at a time.

    Its socket stays open: closing one of this protocol waits until nftables has destroyed what the last transaction
    took out, which is a grace period of RCU and takes ten milliseconds and more.
    Source: Linux nf_tables_api.c, nft_rcv_nl_event().
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def forget_ports(self, ports: Iterable[Forward]) -> None:
        """What comes for these ports is looked at anew; no error."""
        wanted = {(port.address.version, port.protocol, port.host_port) for port in ports}
        for version, protocol, number in wanted:
            own = _attribute(_PROTO_NUM, bytes([_NUMBERS[protocol]])) + _attribute(_PROTO_DST_PORT, number.to_bytes(2))
            match = _attribute(_TUPLE_PROTO | _NESTED, own)
            self._send(_forgetting(version, _ORIG, match, _COUNTS_NUM | _COUNTS_DST_PORT))

    def forget_address(self, address: Address) -> None:
        """So is what goes to a container's address; no error."""
        own = _attribute(_IP_SRC[address.version], address.packed)
        self._send(_forgetting(address.version, _REPLY, _attribute(_TUPLE_IP | _NESTED, own), _COUNTS_SRC))

    def close(self) -> None:
        """Harmless when repeated."""
        netlink, self._socket = self._socket, None
        if netlink is not None:
            netlink.close()

    def _send(self, request: bytes) -> None:
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
            self._socket.send(request)
            *_, code = _ANSWER.unpack_from(self._socket.recv(4096))
        except OSError as e:
            self.close()  # an answer that comes late would be taken for the next one's
            code = -(e.errno or errno.EIO)
        if code and -code != errno.ENOENT:
            log.debug("conntrack.not_forgotten", error=os.strerror(-code))


def _forgetting(version: int, which: int, match: bytes, counts: int) -> bytes:
    flags = _attribute(_FILTER_ORIG, struct.pack("=I", counts if which == _ORIG else 0))
    flags += _attribute(_FILTER_REPLY, struct.pack("=I", counts if which == _REPLY else 0))
    body = _attribute(which | _NESTED, match) + _attribute(_FILTER | _NESTED, flags)
    header = _HEADER.pack(_HEADER.size + len(body), _DELETE, _REQUEST_ACK, 1, 0, _FAMILY[version], 1, 0)
    return header + body


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length & 3)
