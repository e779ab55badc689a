"""Frames over a unix stream socket, both for the zygote and for the shims.

    +----------------+----------------------+
    | length, 4 bytes| JSON object, UTF-8   |     the length is big-endian and at most MAX_FRAME
    +----------------+----------------------+

File descriptors travel as SCM_RIGHTS on the sendmsg(2) that carries a frame's first byte. The kernel never
returns bytes that follow a message with descriptors in the same recvmsg(2), so the descriptors of one receive
belong to a frame that begins in it. A handler takes those of its frame with take_fds(); what it leaves is closed.
"""

import array
import contextlib
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

type Message = dict[str, object]

HEADER = struct.Struct(">I")
MAX_FRAME = 4 << 20
MAX_FDS = 16
MAX_UNSENT = 8 << 20
RECEIVE_SIZE = 64 << 10

_FD_SIZE = array.array("i").itemsize
_ANCILLARY_SIZE = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)
_TRUNCATED = int(socket.MSG_CTRUNC)  # an enum's own & takes longer than all the rest
_from_json = json.JSONDecoder().decode
_to_json = json.JSONEncoder(separators=(",", ":")).encode


class ProtocolError(Exception):
    """The peer does not speak this protocol; the connection is of no further use."""


def encode(message: Mapping[str, object]) -> bytes:
    """One frame. Raises ProtocolError if it would be larger than the peer accepts."""
    body = _to_json(message).encode()
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a frame of {len(body)} bytes is larger than {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


class Decoder:
    """Turns a stream of bytes, cut anywhere, back into messages."""

    __slots__ = ("_buffer", "_consumed")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._consumed = 0

    def feed(self, data: bytes) -> Iterator[tuple[Message, int]]:
        """Add bytes; yield each message now complete and the stream offset of its end. Raises ProtocolError."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise ProtocolError(f"a frame of {length} bytes is larger than {MAX_FRAME}")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[HEADER.size : end])
            del self._buffer[:end]
            self._consumed += end
            yield decode(body), self._consumed


def decode(body: bytes) -> Message:
    """The JSON object of a frame. Raises ProtocolError for anything else."""
    try:
        message = _from_json(body.decode())
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"a frame is not JSON: {type(e).__name__}") from e
    if not isinstance(message, dict):
        raise ProtocolError("a frame is not a JSON object")
    return message


class Channel:
    """One connected socket that speaks frames; works blocking or not. Owns the socket and every fd not yet taken."""

    __slots__ = ("_decoder", "_fds", "_received", "_unsent", "_unsent_bytes", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._decoder = Decoder()
        self._received = 0
        self._fds: deque[tuple[int, int]] = deque()  # fd, stream offset where the receive that brought it ended
        self._unsent: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._unsent_bytes = 0

    def receive(self) -> Iterator[Message]:
        """One recvmsg(2) and the messages it completed.

        Raises BlockingIOError when there is nothing, EOFError when the peer is gone, ProtocolError.
        """
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(RECEIVE_SIZE, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError as e:
            raise EOFError from e
        self._received += len(data)
        self._fds.extend((fd, self._received) for fd in _rights(ancillary))
        if flags & _TRUNCATED or len(self._fds) > MAX_FDS:
            raise ProtocolError(f"more than {MAX_FDS} file descriptors at once")
        if not data:
            raise EOFError
        for message, end in self._decoder.feed(data):
            yield message
            while self._fds and self._fds[0][1] <= end:
                os.close(self._fds.popleft()[0])

    def take_fds(self, count: int) -> list[int]:
        """Descriptors that came with the current message; the caller owns them. Raises ProtocolError if fewer came."""
        if count > len(self._fds):
            raise ProtocolError(f"the request needs {count} file descriptors and came with {len(self._fds)}")
        return [self._fds.popleft()[0] for _ in range(count)]

    def send(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Queue a message and send what the socket takes now; `fds` stay the caller's and must live until sent.

        Raises EOFError if the peer is gone or does not read, ProtocolError if the message is too large.
        """
        data = encode(message)
        if self._unsent_bytes + len(data) > MAX_UNSENT:
            raise EOFError("the peer does not read")
        self._unsent.append((memoryview(data), fds))
        self._unsent_bytes += len(data)
        self.flush()

    def flush(self) -> bool:
        """Send what is queued; whether nothing is left. Raises EOFError if the peer is gone."""
        try:
            while self._unsent:
                data, fds = self._unsent[0]
                sent = self._sendmsg(data, fds)
                self._unsent_bytes -= sent
                if sent == len(data):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = (data[sent:], ())
        except BlockingIOError:
            return False
        except OSError as e:
            raise EOFError from e
        return True

    @property
    def unsent(self) -> int:
        """Bytes waiting for the peer to read."""
        return self._unsent_bytes

    def close(self) -> None:
        """Close the socket and every descriptor nobody took."""
        while self._fds:
            os.close(self._fds.popleft()[0])
        self._unsent.clear()
        self._unsent_bytes = 0
        self.sock.close()

    def _sendmsg(self, data: memoryview, fds: Sequence[int]) -> int:
        if not fds:
            return self.sock.send(data)
        return self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def _rights(ancillary: Sequence[tuple[int, int, bytes]]) -> Iterator[int]:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
            yield from fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that an error left over; one that is already closed is no error here."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
