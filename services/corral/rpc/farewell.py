"""Sending clients away before gRPC's server is stopped, so that none of their calls falls in between.

    gates are shut     calls that come are refused (UNAVAILABLE); what was begun has been answered
    GOAWAY             clients begin their next calls elsewhere, and hang up once they have been told of the last one
    cut                who has not hung up in time, or can't be told, sees the connection end (UNAVAILABLE)
    server.stop()      finds nobody

The order matters. A server that has begun to stop throws away each call that it has not taken up by then, and those
that come until the client knows; gRPC tells their clients CANCELLED, which they may not take for "not begun". It can
say GOAWAY without stopping, to connections of a certain age for one, but not when it is asked to (1.85). So the frame
is written here, to the sockets that gRPC reads and writes. It must not get into the middle of another frame, nor come
before the first: so it is sent once all calls have ended. What is written then is short (refusals, pings) and sent in
one piece, and what was longer, or came first, has left the socket.
"""

import asyncio
import fcntl
import os
import socket
import struct
import termios
from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Length 8, type 7, no flags, stream 0; all streams up to the highest number may have been begun; NO_ERROR.
# Source: RFC 9113, 4.1 and 6.8.
GOAWAY = struct.pack("!IBIII", 8 << 8 | 7, 0, 0, (1 << 31) - 1, 0)
# A program of classic BPF, which takes no byte of any packet. Source: linux/filter.h, BPF_RET | BPF_K.
TAKE_NOTHING = array("B", struct.pack("HBBI", 0x06, 0, 0, 0))
SO_ATTACH_FILTER = 26
# By then gRPC has sent its first frame to who has just connected.
SETTLED_S = 0.05
# Clients hang up within milliseconds, unless they are stopped or out of reach, or keep an old call in hand.
HANG_UP_S = 1.0
# Whoever has read GOAWAY so long ago begins nothing any more, and has been told of what was on its way.
READ_S = 0.25
LOOK_S = 0.005

type Name = str | int
"""Of a connection's own end: the path that its listening socket was bound to, or the port."""


class Farewell:
    """To who is connected to us at some names; made when no more are wanted, said when what they asked for is done."""

    def __init__(
        self, plain: Collection[Name], sealed: Collection[Name], others: Callable[[], Collection[int]] = tuple
    ) -> None:
        """Clients with TLS, `sealed`, can't be told. others: the inodes of sockets that are not gRPC's but lead to it;
        as long as there are any, more may connect."""
        self._plain, self._sealed, self._others = plain, sealed, others
        self._loop = asyncio.get_running_loop()
        self._since: dict[int, float] = {}
        self._told: set[int] = set()
        self._read: dict[int, float] = {}
        for listening, _ in _sockets((*plain, *sealed), others(), listening=True):
            _take_no_more(listening)
        self._look()

    async def say(self) -> None:
        """Return when nobody is connected any more. Who has nothing to say has not to be waited for."""
        deadline = self._loop.time() + HANG_UP_S
        while (self._look() or self._others()) and self._loop.time() < deadline:  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(LOOK_S)
        self._cut()

    def _look(self) -> int:
        """How many may still have something to say; those whose time has come are told."""
        count = 0
        for connection, inode in _sockets(self._plain, self._others()):
            count += not self._is_done(connection, inode)
        return count

    def _is_done(self, connection: socket.socket, inode: int) -> bool:
        now = self._loop.time()
        if now - self._since.setdefault(inode, now) < SETTLED_S or _unread(connection):
            return False
        if inode in self._told:
            return now - self._read.setdefault(inode, now) >= READ_S
        with suppress(OSError):  # it has hung up
            connection.send(GOAWAY, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        self._told.add(inode)
        return False

    def _cut(self) -> None:
        for connection, _ in _sockets((*self._plain, *self._sealed), self._others()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _take_no_more(listening: socket.socket) -> None:
    """Of TCP, where nothing can be put in its place: who connects now is heard by whoever listens a second later, when
    the kernel tries again. A listening socket that is shut down gRPC would log as an error."""
    if listening.family in (socket.AF_INET, socket.AF_INET6):
        address, _ = TAKE_NOTHING.buffer_info()
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, address))


def _sockets(
    names: Collection[Name], others: Collection[int], *, listening: bool = False
) -> Iterator[tuple[socket.socket, int]]:
    """A copy of each connection that was accepted at one of those names, or of what accepts them, closed when the next
    one is asked for; and its inode, by which it can be told from others."""
    for each in Path("/proc/self/fd").iterdir():
        with _copied(int(each.name)) as copy:
            if copy is None or copy.type != socket.SOCK_STREAM:
                continue
            inode = os.fstat(copy.fileno()).st_ino
            if inode not in others and _listens(copy) == listening and _name(copy) in names:
                yield copy, inode


@contextmanager
def _copied(fd: int) -> Iterator[socket.socket | None]:
    """None for what is no socket, or was closed by its thread meanwhile."""
    try:
        copy = os.dup(fd)
    except OSError:
        yield None
        return
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        yield None
        return
    with connection:
        yield connection


def _listens(stream: socket.socket) -> bool:
    return bool(stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _name(connection: socket.socket) -> Name | None:
    name = connection.getsockname()
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        return int(name[1])
    return name if isinstance(name, str) else None


def _unread(connection: socket.socket) -> int:
    """How many of our bytes have not reached the other side. Source: unix(7), tcp(7), SIOCOUTQ."""
    (count,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    return int(count)
