"""Moving a network device into another network namespace, with its addresses, by rtnetlink.

The kernel drops the addresses of a device that changes its namespace, so they are listed before and added after.
Source: rtnetlink(7), linux/if_link.h, linux/if_addr.h.
"""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from corral.kernel.syscalls import failure

_NEWLINK, _NEWADDR, _GETADDR = 16, 20, 22
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_CREATE, _EXCL = 0x400, 0x200
_IFLA_IFNAME, _IFLA_NET_NS_PID = 3, 19
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS, _IFA_RT_PRIORITY = 1, 2, 4, 8, 9
_KEPT = frozenset((_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_RT_PRIORITY))
_PERMANENT = 0x80
# What an administrator asks for; the rest is state: NODAD, HOMEADDRESS, MANAGETEMPADDR, NOPREFIXROUTE, MCAUTOJOIN.
_ASKED_FLAGS = 0x02 | 0x10 | 0x100 | 0x200 | 0x400
_UNIVERSE = 0
_UP = 1

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class Address:
    """A permanent address of global scope; attributes are those of rtnetlink that go with it."""

    family: int
    prefix: int
    flags: int
    attributes: tuple[tuple[int, bytes], ...]


def addresses_of(index: int) -> list[Address]:
    """The permanent addresses of global scope of a device in the caller's network namespace."""
    with _Socket() as netlink:
        found = []
        for body in netlink.call(_GETADDR, _DUMP, _ADDRESS.pack(0, 0, 0, 0, 0)):
            family, prefix, flags, scope, device = _ADDRESS.unpack_from(body)
            attributes = dict(_attributes(body[_ADDRESS.size :]))
            if whole := attributes.get(_IFA_FLAGS):
                (flags,) = struct.unpack("=I", whole)
            if device == index and scope == _UNIVERSE and flags & _PERMANENT:
                kept = tuple((kind, value) for kind, value in attributes.items() if kind in _KEPT)
                found.append(Address(family, prefix, flags & _ASKED_FLAGS, kept))
        return found


def move(index: int, *, pid: int, name: str) -> None:
    """Move a device of the caller's namespace into that of process pid, as name (`%d` in it: the kernel numbers it).

    It is down afterwards, and has no addresses.
    """
    attributes = _attribute(_IFLA_IFNAME, name.encode() + b"\0") + _attribute(_IFLA_NET_NS_PID, struct.pack("=I", pid))
    with _Socket() as netlink:
        netlink.call(_NEWLINK, _ACK, _LINK.pack(0, 0, index, 0, 0) + attributes)


def add_address(index: int, address: Address) -> None:
    """Give a device of the caller's namespace an address."""
    body = _ADDRESS.pack(address.family, address.prefix, address.flags & 0xFF, _UNIVERSE, index)
    body += b"".join(_attribute(kind, value) for kind, value in address.attributes)
    body += _attribute(_IFA_FLAGS, struct.pack("=I", address.flags))
    with _Socket() as netlink:
        netlink.call(_NEWADDR, _ACK | _CREATE | _EXCL, body)


def bring_up(index: int) -> None:
    """Bring up a device of the caller's namespace."""
    with _Socket() as netlink:
        netlink.call(_NEWLINK, _ACK, _LINK.pack(0, 0, index, _UP, _UP))


class _Socket:
    """A socket of rtnetlink; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Send a request; the bodies of what is answered. Raises the OSError that the kernel answers with."""
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, 1, 0) + body)
        answers: list[bytes] = []
        while True:
            for answer, content in _messages(self._socket.recv(1 << 17)):
                if answer == _ERROR:
                    (code,) = struct.unpack_from("=i", content)
                    if code:
                        raise failure(-code, "rtnetlink")
                    return answers
                if answer == _DONE:
                    return answers
                answers.append(content)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return (_ATTRIBUTE.pack(length, kind) + value).ljust(_aligned(length), b"\0")


def _aligned(length: int) -> int:
    return max(4, (length + 3) & ~3)


def index_of(name: str) -> int:
    """The number of a device of the caller's namespace. Raises OSError(ENODEV) if there is none of that name."""
    try:
        return socket.if_nametoindex(name)
    except OSError as e:
        raise failure(e.errno or 19, "if_nametoindex", name) from e


def names() -> dict[int, str]:
    """All devices of the caller's namespace, by number."""
    return dict(socket.if_nameindex())
