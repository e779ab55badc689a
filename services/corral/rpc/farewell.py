"""Ending connections before gRPC's server is stopped, so that none of their calls falls in between.

    gates are shut     calls that come are refused (UNAVAILABLE); what was begun has been answered
    cut                each connection when nothing is on its way, or when the time is over; clients connect anew
    server.stop()      finds nobody

The order matters. A server that has begun to stop throws away each call that it has not taken up by then, and those
that come until the client knows; gRPC (1.85) tells their clients CANCELLED, which they may not take for "not begun".
A connection that ends is UNAVAILABLE. Nothing is written to gRPC's sockets here, for nobody but gRPC knows whether the
last frame has left in full.
"""

import asyncio
import fcntl
import os
import socket
import struct
import termios
from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

# A program of classic BPF, which takes no byte of any packet. Source: linux/filter.h, BPF_RET | BPF_K.
TAKE_NOTHING = array("B", struct.pack("HBBI", 0x06, 0, 0, 0))
SO_ATTACH_FILTER = 26
# For who calls without a pause, or does not read.
QUIET_WITHIN_S = 0.25
LOOK_S = 0.005

type Name = str | int
"""Of a connection's own end: the path that its listening socket was bound to, or the port."""


async def cut(names: Collection[Name], others: Callable[[], Collection[int]] = tuple) -> None:
    """End all connections that were accepted at those names, when the gates are shut; no new ones are accepted.

    others: the inodes of sockets of such names that are not gRPC's but lead to it, and end with that.
    """
    with ExitStack() as held:
        for _, listening in _sockets(names, others(), listening=True):
            _take_no_more(held.enter_context(listening))
        left = {inode: held.enter_context(each) for inode, each in _sockets(names, others())}
        await _cut_when_quiet(left)
        for _, each in _sockets(names, others()):  # who came through the door meanwhile, or never was quiet
            _end(held.enter_context(each))


async def _cut_when_quiet(left: dict[int, socket.socket]) -> None:
    """End each connection that was found without any bytes on their way twice in a row."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + QUIET_WITHIN_S
    before: set[int] = set()
    while left and loop.time() < deadline:
        quiet = {inode for inode, each in left.items() if not _on_the_way(each)}
        for inode in quiet & before:
            _end(left.pop(inode))
        before = quiet
        await asyncio.sleep(LOOK_S)


def _end(connection: socket.socket) -> None:
    """What has been sent is still received."""
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def _on_the_way(connection: socket.socket) -> int:
    """How many bytes, in both directions, whoever is to receive them has not. Source: unix(7), tcp(7)."""
    return sum(_count(connection, request) for request in (termios.TIOCOUTQ, termios.FIONREAD))


def _count(connection: socket.socket, request: int) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(connection, request, bytes(4)))
    return int(count)


def _take_no_more(listening: socket.socket) -> None:
    """Of TCP, where nothing can be put in its place: who connects now is heard by whoever listens a second later, when
    the kernel tries again. A listening socket that is shut down gRPC would log as an error."""
    if listening.family in (socket.AF_INET, socket.AF_INET6):
        address, _ = TAKE_NOTHING.buffer_info()
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, address))


def _sockets(
    names: Collection[Name], others: Collection[int], *, listening: bool = False
) -> Iterator[tuple[int, socket.socket]]:
    """The inode and a copy, to be closed, of each connection that was accepted at one of those names, or of what
    accepts them."""
    for each in Path("/proc/self/fd").iterdir():
        copy = _copied(each)
        if copy is None:
            continue
        inode = os.fstat(copy.fileno()).st_ino
        if inode not in others and copy.type == socket.SOCK_STREAM and _is(copy, names, listening):
            yield inode, copy
        else:
            copy.close()


def _copied(link: Path) -> socket.socket | None:
    """None for what is no socket, or was closed by its thread meanwhile. Files are not even copied: closing any
    descriptor of one ends this process's locks on it, see fcntl(2)."""
    with suppress(OSError):
        if link.readlink().name.startswith("socket:"):
            copy = os.dup(int(link.name))
            try:
                return socket.socket(fileno=copy)
            except OSError:
                os.close(copy)
    return None


def _is(stream: socket.socket, names: Collection[Name], listening: bool) -> bool:
    listens = bool(stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return listens == listening and _name(stream) in names


def _name(connection: socket.socket) -> Name | None:
    name = connection.getsockname()
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        return int(name[1])
    return name if isinstance(name, str) else None
