"""TCP: each connection to a port at ::1 is one more to its target, and bytes go both ways until both sides have ended.

What cannot be sent on at once is at most one chunk each way; until it is, no more is read, so that whoever is slow
slows down the other. The end of one way is passed on by itself. What is cut off, or reaches nobody, is reset.
"""

import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from corral.network.proxy.loop import READ, WRITE, Loop
from corral.network.proxy.wire import Target

CHUNK_BYTES = 128 << 10
_ACCEPTED_AT_ONCE = 32
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC)
_FULL_PAUSE_S = 0.2
_SYN_RETRIES = 3  # a target that does not answer is given up after 15 seconds
_NOTHING = memoryview(b"")
_RESET = struct.pack("ii", 1, 0)  # struct linger: closing drops what is unsent, and tells

_buffer = memoryview(bytearray(CHUNK_BYTES))


@dataclass(slots=True)
class Room:
    """How many more connections there may be, of all ports together."""

    left: int


class StreamPort:
    """A socket that is listened on from now on, and what came by it."""

    def __init__(self, loop: Loop, sockets: Sequence[socket.socket], target: Target, room: Room) -> None:
        """sockets: those that hold the port, the one to listen on first. Raises OSError."""
        listener = sockets[0]
        self._loop = loop
        self._room = room
        self._listener = listener
        self._target = target
        self._connections: set[_Connection] = set()
        listener.setblocking(False)
        loop.watch(listener, READ, self._accept)
        _listen(sockets)

    def lead_to(self, target: Target) -> None:
        """Have another target; what goes on with the last one is cut off."""
        if target != self._target:
            self._target = target
            self._cut()

    def close(self) -> None:
        self._loop.watch(self._listener, 0, self._accept)
        self._listener.close()
        self._cut()

    def _cut(self) -> None:
        for connection in list(self._connections):
            connection.cut()

    def _accept(self, _events: int) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            if not self._room.left:
                self._pause()
                return
            try:
                near, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno == errno.ECONNABORTED:
                    continue
                self._pause()
                return
            try:
                self._begin(near)
            except OSError as e:
                _reset(near)
                if e.errno in _FULL:
                    self._pause()
                    return

    def _begin(self, near: socket.socket) -> None:
        """Raises OSError: no way leads to the target, or no file is left."""
        far = _connecting(self._target)
        try:
            self._connections.add(_Connection(self._loop, near, far, self._on_end))
        except BaseException:
            far.close()
            raise
        self._room.left -= 1

    def _on_end(self, connection: "_Connection") -> None:
        self._connections.discard(connection)
        self._room.left += 1

    def _pause(self) -> None:
        """Callers wait in the listener's queue for others to end."""
        self._loop.watch(self._listener, 0, self._accept)
        self._loop.call_later(_FULL_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.watch(self._listener, READ, self._accept)


class _End:
    """One of the two sockets of a connection."""

    __slots__ = ("ended", "socket", "unsent")

    def __init__(self, own: socket.socket) -> None:
        own.setblocking(False)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket = own
        self.unsent = _NOTHING  # what the other end has sent it
        self.ended = False  # nothing more comes from it


class _Connection:
    def __init__(
        self, loop: Loop, near: socket.socket, far: socket.socket, on_end: "Callable[[_Connection], None]"
    ) -> None:
        self._loop = loop
        self._on_end = on_end
        self._near, self._far = _End(near), _End(far)
        loop.watch(far, WRITE, self._on_connected)

    def _on_connected(self, _events: int) -> None:
        self._loop.watch(self._far.socket, 0, self._on_connected)
        if self._far.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.cut()
        else:
            self._watch()

    def _on_near(self, events: int) -> None:
        self._go_on(self._near, self._far, events)

    def _on_far(self, events: int) -> None:
        self._go_on(self._far, self._near, events)

    def _go_on(self, end: _End, other: _End, events: int) -> None:
        try:
            with contextlib.suppress(BlockingIOError):
                if events & WRITE:
                    _flush(end, other)
                if events & READ:
                    _pass_on(end, other)
        except OSError:
            self.cut()
            return
        if self._near.ended and self._far.ended and not self._near.unsent and not self._far.unsent:
            self._close()
        else:
            self._watch()

    def _watch(self) -> None:
        for end, other, call in ((self._near, self._far, self._on_near), (self._far, self._near, self._on_far)):
            wanted = 0 if end.ended or other.unsent else READ
            self._loop.watch(end.socket, wanted | (WRITE if end.unsent else 0), call)

    def cut(self) -> None:
        """Reset both ends."""
        for end in (self._near, self._far):
            end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close()

    def _close(self) -> None:
        for end, call in ((self._near, self._on_near), (self._far, self._on_far)):
            self._loop.watch(end.socket, 0, call)
            end.socket.close()
        self._on_end(self)


def _pass_on(end: _End, other: _End) -> None:
    """Read once, and send on what can be sent. Raises OSError."""
    size = end.socket.recv_into(_buffer)
    if not size:
        end.ended = True
        if not other.unsent:
            other.socket.shutdown(socket.SHUT_WR)
        return
    sent = 0
    with contextlib.suppress(BlockingIOError):
        sent = other.socket.send(_buffer[:size])
    if sent < size:
        other.unsent = memoryview(bytes(_buffer[sent:size]))


def _flush(end: _End, other: _End) -> None:
    """Send what waits. Raises OSError."""
    sent = end.socket.send(end.unsent)
    end.unsent = end.unsent[sent:] or _NOTHING
    if not end.unsent and other.ended:
        end.socket.shutdown(socket.SHUT_WR)


def _listen(sockets: Sequence[socket.socket]) -> None:
    """On the first of them; what else of ours covers its address allows that meanwhile. Raises OSError.

    What connections leave behind has the setting of the listener: it is to keep nobody from binding it anew.
    """
    listener, *others = sockets
    covering = [each for each in others if each.family == socket.AF_INET6]
    try:
        for each in (listener, *covering):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        listener.listen()
    finally:
        for each in covering:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)


def _connecting(target: Target) -> socket.socket:
    """Begin to connect. Raises OSError."""
    made = socket.socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _SYN_RETRIES)
        with contextlib.suppress(BlockingIOError):
            made.connect(target)
    except BaseException:
        made.close()
        raise
    return made


def _reset(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    one.close()
