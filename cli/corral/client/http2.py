"""HTTP/2 over a unix socket, as far as calls need it that are made one after the other. Source: RFC 9113.

connect, settings  -->
                   <--  settings: only now is there somebody to call, as with gRPC's own client
headers, data      -->
                   <--  headers, data, headers (trailers), or a reset, or GOAWAY
"""

import _socket
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

from corral.rpc.frames import (
    ACKNOWLEDGES,
    CHUNK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    ENDS_HEADERS,
    ENDS_STREAM,
    GOAWAY,
    HAS_PRIORITY,
    HEAD_BYTES,
    HEADERS,
    INITIAL_WINDOW,
    IS_PADDED,
    MAX_FRAME,
    PING,
    PREFACE,
    RESET,
    SETTINGS,
    WINDOW,
    frame,
)
from corral.rpc.hpack import Decoder, Field, encode

HANDSHAKE_S = 60.0
"""Who executes itself anew answers those that have connected meanwhile, which takes a while on a busy machine."""
QUEUE_IS_FULL_S = 0.01
"""What to wait then."""

_WINDOW = 4 << 20
"""What may come before it was asked for."""


_encoded = lru_cache(maxsize=64)(encode)
"""Who makes many calls makes the same few."""
_known: dict[bytes, dict[bytes, bytes]] = {}
"""Header fields that were heard, by their blocks."""


class GoneAwayError(Exception):
    """The server says that it has not begun a call."""


class NobodyThereError(Exception):
    """There is no server; says why."""


class Connection:
    """To a server; one call at a time."""

    def __init__(self, path: str) -> None:
        """Raises NobodyThereError."""
        try:
            self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        except OSError as e:  # this process has as many descriptors as it may have
            raise NobodyThereError(e.strerror) from e
        self.path = path
        self.is_usable = True
        """For a further call."""
        self._process = os.getpid()
        self._buffer = bytearray()
        self._fields = Decoder()
        self._next_stream = 1
        self._may_send = self._initial_window = DEFAULT_WINDOW
        self._taken = self._taken_of_stream = 0
        try:
            self._socket.settimeout(HANDSHAKE_S)
            self._connect(path)
            self._greet()
            self._socket.settimeout(None)
        except (OSError, EOFError, ValueError) as e:
            self.close()
            raise NobodyThereError(getattr(e, "strerror", None) or str(e)) from e

    def _connect(self, path: str) -> None:
        """Raises OSError. Where many wait in its queue already, the kernel would have one with a timeout come again."""
        until = time.monotonic() + HANDSHAKE_S
        while True:
            try:
                return self._socket.connect(path)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
            time.sleep(QUEUE_IS_FULL_S)

    def _greet(self) -> None:
        """Until the server has. Raises EOFError, OSError, ValueError."""
        settings = ENABLE_PUSH.to_bytes(2) + bytes(4) + INITIAL_WINDOW.to_bytes(2) + _WINDOW.to_bytes(4)
        more = (_WINDOW - DEFAULT_WINDOW).to_bytes(4)
        self._send(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW, 0, 0, more))
        kind, flags, stream, payload = self._receive()
        if kind != SETTINGS or flags & ACKNOWLEDGES:
            raise EOFError("it does not speak HTTP/2")
        self._attend(kind, flags, stream, payload)

    def close(self) -> None:
        """Ends what still runs; harmless when repeated."""
        self.is_usable = False
        self._socket.close()

    def __del__(self) -> None:
        """Of a channel that nobody has closed, as with the library's."""
        with suppress(AttributeError):
            self._socket.close()

    def interrupt(self) -> None:
        """End the call that another thread waits for. The calls of who has forked this process are not ours to end."""
        if self._process == os.getpid():
            with suppress(OSError):  # it has ended
                self._socket.shutdown(_socket.SHUT_RDWR)

    def owner(self) -> int:
        """The user who listens there. Source: unix(7), SO_PEERCRED."""
        return int.from_bytes(self._socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[4:8], sys.byteorder)

    def has_room(self, length: int) -> bool:
        """Whether that much may be sent without waiting for the server to have read."""
        return length <= min(self._may_send, self._initial_window)

    def is_still_usable(self) -> bool:
        """After what has come meanwhile, without waiting for more. A fork has no part in its parent's."""
        if self._process != os.getpid():
            return False
        try:
            while self.is_usable:
                self._buffer += self._socket.recv(CHUNK, _socket.MSG_DONTWAIT) or self._ended()
                while self._has_frame():
                    self._attend(*self._receive())
        except BlockingIOError:
            pass
        except (OSError, EOFError, ValueError):
            self.is_usable = False
        return self.is_usable

    def call(self, fields: Sequence[Field], data: bytes) -> int:
        """Sends a request, for which there is room; the number of its stream. What comes tells whether it arrived."""
        stream = self._next_stream
        self._next_stream += 2
        self._taken_of_stream = 0
        self._may_send -= len(data)
        block = _encoded(tuple(fields))
        parts = [block[at : at + MAX_FRAME] for at in range(0, len(block), MAX_FRAME)]
        frames = [
            frame(CONTINUATION if n else HEADERS, ENDS_HEADERS if n == len(parts) - 1 else 0, stream, part)
            for n, part in enumerate(parts)
        ]
        for at in range(0, len(data), MAX_FRAME):
            flags = ENDS_STREAM if at + MAX_FRAME >= len(data) else 0
            frames.append(frame(DATA, flags, stream, data[at : at + MAX_FRAME]))
        self._send(b"".join(frames))
        return stream

    def answer(self, stream: int) -> tuple[int, int, bytes]:
        """What comes next of a stream: HEADERS (decode() reads them), DATA or RESET, flags, and payload.

        Raises GoneAwayError, EOFError or OSError where the connection ends, ValueError for what is malformed.
        """
        while True:
            kind, flags, of_stream, payload = self._receive()
            if kind == DATA:
                self._take(of_stream, len(payload))
            if kind == GOAWAY:
                self.is_usable = False
                if stream > int.from_bytes(payload[:4]) & 0x7FFFFFFF:
                    raise GoneAwayError
            elif of_stream == stream and kind in (HEADERS, DATA, RESET):
                return kind, flags, payload
            else:
                self._attend(kind, flags, of_stream, payload)

    def decode(self, block: bytes) -> Mapping[bytes, bytes]:
        """Raises ValueError."""
        return self._fields.meaning(block, dict, _known)

    def _attend(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """To what belongs to the connection, or to a call that is over."""
        if kind == SETTINGS and not flags & ACKNOWLEDGES:
            for at in range(0, len(payload) - 5, 6):
                if int.from_bytes(payload[at : at + 2]) == INITIAL_WINDOW:
                    self._initial_window = int.from_bytes(payload[at + 2 : at + 6])
            self._send(frame(SETTINGS, ACKNOWLEDGES, 0, b""))
        elif kind == PING and not flags & ACKNOWLEDGES:
            self._send(frame(PING, ACKNOWLEDGES, 0, payload))
        elif kind == WINDOW and stream == 0:
            self._may_send += int.from_bytes(payload)
        elif kind == GOAWAY:
            self.is_usable = False
        elif kind == HEADERS:
            self.decode(payload)  # later fields may refer to these

    def _take(self, stream: int, length: int) -> None:
        """Let as much more come as came, in large portions."""
        self._taken += length
        self._taken_of_stream += length
        if self._taken >= _WINDOW // 4:
            self._send(frame(WINDOW, 0, 0, self._taken.to_bytes(4)))
            self._taken = 0
        if self._taken_of_stream >= _WINDOW // 4:
            self._send(frame(WINDOW, 0, stream, self._taken_of_stream.to_bytes(4)))
            self._taken_of_stream = 0

    def _send(self, data: bytes) -> None:
        """Whom the server has hung up on has perhaps an answer to read yet, or is told there."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            self.is_usable = False

    def _has_frame(self) -> bool:
        length = len(self._buffer) - HEAD_BYTES
        return length >= 0 and length >= int.from_bytes(self._buffer[:3])

    def _receive(self) -> tuple[int, int, int, bytes]:
        """Kind, flags, stream and payload of a frame; of HEADERS, those that continue it are a part."""
        kind, flags, stream, payload = self._receive_one()
        if flags & IS_PADDED and kind in (DATA, HEADERS):
            raise ValueError("padding, which gRPC does without")
        if kind == HEADERS:
            if flags & HAS_PRIORITY:
                payload = payload[5:]
            last = flags
            while not last & ENDS_HEADERS:
                _, last, _, more = self._receive_one()
                payload += more
        return kind, flags, stream, payload

    def _receive_one(self) -> tuple[int, int, int, bytes]:
        while not self._has_frame():
            if len(self._buffer) >= 3 and int.from_bytes(self._buffer[:3]) > MAX_FRAME:
                raise EOFError("it does not speak HTTP/2")
            self._buffer += self._socket.recv(CHUNK) or self._ended()
        end = HEAD_BYTES + int.from_bytes(self._buffer[:3])
        found = bytes(self._buffer[:end])
        del self._buffer[:end]
        return found[3], found[4], int.from_bytes(found[5:HEAD_BYTES]) & 0x7FFFFFFF, found[HEAD_BYTES:]

    def _ended(self) -> bytes:
        raise EOFError("Socket closed")
