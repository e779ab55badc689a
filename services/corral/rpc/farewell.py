"""Ending connections before gRPC's server is stopped, so that none of their calls falls in between.

    gates are shut     what was begun has been answered; calls that come are left unanswered (corral.rpc.interceptor)
    send_away          if somebody else is to serve, and no call is left inside: GOAWAY to each whom nothing is on its
                       way to. It says that no call without an answer was begun, so any gRPC client makes these again,
                       by a new connection
    cut                who could not be told (TLS), does not read or has not hung up in time
    server.stop()      finds nobody

The order matters. A server that has begun to stop throws away each call that it has not taken up by then, and those
that come until the client knows; gRPC (1.85) tells their clients CANCELLED, which they may not take for "not begun".
A connection that ends is UNAVAILABLE. GOAWAY is written into a connection of gRPC's, which can't be asked to. It must
not get into the middle of a frame, nor come before the first: so all that was written has been read for a while by
then, and there always was room for more.
"""

import asyncio
import errno
import fcntl
import os
import resource
import socket
import stat
import struct
import termios
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

# A program of classic BPF, which takes no byte of any packet. Source: linux/filter.h, BPF_RET | BPF_K.
TAKE_NOTHING = array("B", struct.pack("HBBI", 0x06, 0, 0, 0))
SO_ATTACH_FILTER = 26
# Length 8, type 7, no flags, stream 0; no stream was begun; NO_ERROR. Source: RFC 9113, 4.1 and 6.8.
GOAWAY = struct.pack("!IBIII", 8 << 8 | 7, 0, 0, 0, 0)
# How often in a row all that was written must have been read, and what is between.
QUIET_LOOKS, QUIET_LOOK_S = 4, 0.0125
# To be found quiet. On a busy machine that takes its time, and only who is stopped needs all.
AWAY_WITHIN_S = 3.0
# For reading that, and for who does not read at all: others are not served meanwhile. Who has read it hangs up, as soon
# as the machine lets him; if he were cut off before, a call that he is about to send would fail.
READ_WITHIN_S = 0.5
# For who calls without a pause, or does not read.
QUIET_WITHIN_S = 0.25
LOOK_S = 0.005

# The address of who listens at all; a connection has that of its own.
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}

type Port = tuple[str, int]
type Name = str | Port
"""What a listening socket was bound to: a path, or an address and a port of it. Other sockets of this process may
listen at the same port of other addresses."""


class Place(NamedTuple):
    """Where a socket listens."""

    family: int
    name: Any
    v6_only: bool

    @property
    def port(self) -> Port:
        """As a name."""
        host, port, *_ = self.name
        return host, port


@dataclass(frozen=True, slots=True)
class _Stream:
    """A descriptor of gRPC's, which may close it at any time. It is not copied: that would fail where there are as many
    as there may be, and keep open what gRPC closes."""

    fd: int
    inode: int

    @contextmanager
    def borrowed(self) -> Iterator[socket.socket]:
        """Raises OSError(EBADF) if the descriptor is another one by now."""
        with _borrowed(self.fd) as stream:
            if os.fstat(self.fd).st_ino != self.inode:
                raise OSError(errno.EBADF, f"descriptor {self.fd} is another one by now")
            yield stream


async def send_away(names: Collection[Name], others: Callable[[], Collection[int]] = tuple) -> None:
    """Have who is connected, without TLS, to sockets of those names call somebody else, who is to be found there
    already; returns when they have hung up, or the time is over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + AWAY_WITHIN_S
    looks: Counter[_Stream] = Counter()
    until: dict[_Stream, float] = {}
    told: set[_Stream] = set()

    def has_time(each: _Stream) -> bool:
        has_read = each in told and not _unread(each)
        return loop.time() < (deadline if has_read else until.get(each, deadline))

    while left := {each for each in _streams(names, others()) if has_time(each)}:
        for each in left - until.keys():
            with suppress(OSError), each.borrowed() as connection:  # it has hung up
                looks[each] = 0 if _count(connection, termios.TIOCOUTQ) else looks[each] + 1
                if looks[each] == QUIET_LOOKS:
                    connection.send(GOAWAY, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                    told.add(each)
                if each in told or _is_full(connection):
                    until[each] = min(loop.time() + READ_WITHIN_S, deadline)
        await asyncio.sleep(QUIET_LOOK_S)


def _is_full(connection: socket.socket) -> bool:
    """So that gRPC may wait with the rest of a frame, until there is room again. Source: Linux, unix_writable()."""
    return _count(connection, termios.TIOCOUTQ) * 4 > connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


async def cut(names: Collection[Name], others: Callable[[], Collection[int]] = tuple) -> None:
    """End all connections that were accepted at those names, when the gates are shut; no new ones are accepted.

    others: the inodes of sockets of such names that are not gRPC's but lead to it, and end with that.
    """
    _take_no_more(names, others())
    await _cut_when_quiet(_streams(names, others()))
    for each in _streams(names, others()):  # who came through the door meanwhile, or never was quiet
        _end(each)


async def _cut_when_quiet(left: set[_Stream]) -> None:
    """End each connection that was found without any bytes on their way twice in a row."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + QUIET_WITHIN_S
    before: set[_Stream] = set()
    while left and loop.time() < deadline:
        quiet = {each for each in left if not _on_the_way(each)}
        for each in quiet & before:
            _end(each)
        left, before = left - (quiet & before), quiet
        await asyncio.sleep(LOOK_S)


def _end(each: _Stream) -> None:
    """What has been sent is still received."""
    with suppress(OSError), each.borrowed() as connection:  # it may have ended
        connection.shutdown(socket.SHUT_RDWR)


def _unread(each: _Stream) -> int:
    """How many bytes its other end has not read; by TCP, that end's kernel."""
    with suppress(OSError), each.borrowed() as connection:
        return _count(connection, termios.TIOCOUTQ)
    return 0


def _on_the_way(each: _Stream) -> int:
    """How many bytes, in both directions, whoever is to receive them has not. Source: unix(7), tcp(7)."""
    with suppress(OSError), each.borrowed() as connection:
        return sum(_count(connection, request) for request in (termios.TIOCOUTQ, termios.FIONREAD))
    return 0


def _count(connection: socket.socket, request: int) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(connection, request, bytes(4)))
    return int(count)


def listening() -> Mapping[int, Place]:
    """By inode, where this process does at TCP ports."""
    return {each.inode: place for each, place in _listening().items()}


def share(name: Port, others: Collection[int]) -> Sequence[Place]:
    """Let other sockets of this user listen at it, too, beside ours; returns where those do. Raises OSError."""
    found = {each: place for each, place in _listening().items() if place.port == name and each.inode not in others}
    for each in found:
        with each.borrowed() as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return tuple(found.values())


def _listening() -> Mapping[_Stream, Place]:
    found: dict[_Stream, Place] = {}
    for each in _sockets(listening=True):
        with suppress(OSError), each.borrowed() as stream:  # closed meanwhile
            if stream.family in ANY:
                found[each] = Place(stream.family, stream.getsockname(), _is_v6_only(stream))
    return found


def _is_v6_only(stream: socket.socket) -> bool:
    return stream.family == socket.AF_INET6 and bool(stream.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))


def _take_no_more(names: Collection[Name], others: Collection[int]) -> None:
    """Of TCP, where nothing can be put in its place: who connects now is heard by whoever listens a second later, when
    the kernel tries again. A listening socket that is shut down gRPC would log as an error."""
    for each, place in _listening().items():
        if place.port in names and each.inode not in others:
            with suppress(OSError), each.borrowed() as stream:
                attach(stream, SO_ATTACH_FILTER, TAKE_NOTHING)


def attach(stream: socket.socket, option: int, program: "array[int]") -> None:
    """One instruction of classic BPF. Raises OSError."""
    address, _ = program.buffer_info()
    stream.setsockopt(socket.SOL_SOCKET, option, struct.pack("HP", 1, address))


def _streams(names: Collection[Name], others: Collection[int]) -> set[_Stream]:
    """Each connection that was accepted at one of those names."""
    found: set[_Stream] = set()
    for each in _sockets(listening=False):
        with suppress(OSError), each.borrowed() as connection:  # closed meanwhile
            if each.inode not in others and not _names(connection).isdisjoint(names):
                found.add(each)
    return found


def _sockets(*, listening: bool) -> Iterator[_Stream]:
    for fd in _descriptors():
        with suppress(OSError):  # closed meanwhile
            status = os.fstat(fd)
            if stat.S_ISSOCK(status.st_mode) and _is_stream(fd, listening):
                yield _Stream(fd, status.st_ino)


def _descriptors() -> Iterable[int]:
    try:
        return [int(each) for each in os.listdir("/proc/self/fd")]  # noqa: PTH208  # thousands, perhaps
    except OSError:  # there are as many as there may be
        return range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _is_stream(fd: int, listening: bool) -> bool:
    with _borrowed(fd) as stream:
        listens = bool(stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        return stream.type == socket.SOCK_STREAM and listens == listening


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """Raises OSError if there is no socket."""
    stream = socket.socket(fileno=fd)
    try:
        yield stream
    finally:
        stream.detach()


def _names(connection: socket.socket) -> set[Name]:
    """Of sockets that may have accepted it."""
    name = connection.getsockname()
    if connection.family in ANY:
        return {(name[0], name[1]), (ANY[connection.family], name[1])}
    return {name} if isinstance(name, str) else set()
