"""HTTP/2 on a server's side, as far as calls with one request need it. Source: RFC 9113.

the client --> preface, settings
           <-- settings, at once
           --> headers, data
           <-- headers, data, headers (trailers)     or a failure: headers with all in them
"""

import asyncio
import contextvars
from collections.abc import Sequence
from functools import partial

import grpc
import structlog

from corral.rpc.brief_call import BEGINNING, Asked, Call, Failure, Find, answer, read, refusal
from corral.rpc.frames import (
    ACKNOWLEDGES,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    ENDS_HEADERS,
    ENDS_STREAM,
    GOAWAY,
    HAS_PRIORITY,
    HEAD_BYTES,
    HEADERS,
    INITIAL_WINDOW,
    IS_PADDED,
    MAX_FRAME,
    MAX_STREAMS,
    PING,
    PREFACE,
    RESET,
    SETTINGS,
    WINDOW,
    frame,
)
from corral.rpc.hpack import Decoder, encode

log = structlog.get_logger()

MOST_CALLS = 100
"""At one time."""
_WINDOW = 1 << 20
"""What a client may send before it was asked for."""
_PROTOCOL_ERROR, _REFUSED = 1, 7
_HIGHEST = 0x7FFFFFFF
_LIMITS = MAX_STREAMS.to_bytes(2) + MOST_CALLS.to_bytes(4) + INITIAL_WINDOW.to_bytes(2) + _WINDOW.to_bytes(4)
_GREETING = frame(SETTINGS, 0, 0, _LIMITS) + frame(WINDOW, 0, 0, (_WINDOW - DEFAULT_WINDOW).to_bytes(4))
_MOST_FIELDS = 64 << 10
"""Bytes of one block of header fields: what is packed in it must not keep the loop for long."""
_ANSWER = encode(BEGINNING)
_known: dict[bytes, Asked | Failure] = {}
"""What blocks of header fields ask for."""
_ALL_WENT_WELL = encode(((b"grpc-status", b"0"),))
_CANCELLED = Failure(grpc.StatusCode.CANCELLED, "the call was cancelled within corral")


class _Stream:
    """One call."""

    __slots__ = ("asked", "body", "end_of_answer", "has_begun", "room", "taken", "task", "unsent", "window")

    def __init__(self, asked: Call | Failure, window: int) -> None:
        self.asked = asked
        self.window = window
        self.body = bytearray()
        self.taken = 0
        self.task: asyncio.Task[None] | None = None
        self.has_begun = False
        """Whether any of the answer was sent."""
        self.unsent = memoryview(b"")
        """Of the answer: what there was no room for yet."""
        self.end_of_answer = b""
        """Fields, once it is whole."""
        self.room: asyncio.Future[None] | None = None
        """When there is some: for who waits for it."""

    def tell_of_room(self) -> None:
        """Perhaps: who waits for it is to look."""
        if self.room is not None and not self.room.done():
            self.room.set_result(None)

    def end(self) -> None:
        """The client is gone, or wants no answer any more."""
        if isinstance(self.asked, Call):
            self.asked.gone = True
        if self.task is not None:
            self.task.cancel()


class Connection(asyncio.Protocol):
    """With one client."""

    def __init__(self, find: Find, others: "set[Connection]") -> None:
        """others: those that there are, of which it is one from its beginning to its end."""
        self._find = find
        self._others = others
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._fields = Decoder()
        self._is_greeted = False
        self._is_held = False
        """Nothing more is taken from a client that does not read what it has asked for."""
        self._newest = 0
        self._block: tuple[int, int, bytearray] | None = None
        """Of header fields that go on in the next frame: stream, flags, and what has come of them."""
        self._streams: dict[int, _Stream] = {}
        self._may_send = self._initial_window = DEFAULT_WINDOW
        self._taken = 0

    def tasks(self) -> Sequence[asyncio.Task[None]]:
        """Of the calls that are not answered."""
        return [each.task for each in self._streams.values() if each.task is not None and not each.task.done()]

    def leave(self, *, may_come_again: bool) -> None:
        """What was written is still sent. may_come_again: with calls whose answers have not begun."""
        if may_come_again:
            begun = max((stream for stream, each in self._streams.items() if each.has_begun), default=0)
            self._transport.write(frame(GOAWAY, 0, 0, begun.to_bytes(4) + bytes(4)))
        self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is none by its type
        self._others.add(self)
        self._transport.write(_GREETING)

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.discard(self)
        streams, self._streams = self._streams, {}
        for each in streams.values():
            each.end()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            self._read()
        except ValueError as e:
            log.info("brief.malformed", error=str(e))
            self._buffer.clear()
            self._transport.write(frame(GOAWAY, 0, 0, self._newest.to_bytes(4) + _PROTOCOL_ERROR.to_bytes(4)))
            self._transport.close()

    def pause_writing(self) -> None:
        self._is_held = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_held = False
        if not self._transport.is_closing():
            self._transport.resume_reading()
            self.data_received(b"")
        for each in self._streams.values():
            each.tell_of_room()

    # What comes

    def _read(self) -> None:
        buffer, at = self._buffer, 0
        if not self._is_greeted:
            if not PREFACE.startswith(bytes(buffer[: len(PREFACE)])):
                raise ValueError("this is no HTTP/2")
            if len(buffer) < len(PREFACE):
                return
            self._is_greeted, at = True, len(PREFACE)
        while (begins := at + HEAD_BYTES) <= len(buffer) and not self._is_held:
            length = int.from_bytes(buffer[at : at + 3])
            if length > MAX_FRAME:
                raise ValueError("a frame is too long")
            end = begins + length
            if end > len(buffer):
                break
            stream = int.from_bytes(buffer[at + 5 : begins]) & _HIGHEST
            self._take(buffer[at + 3], buffer[at + 4], stream, bytes(buffer[begins:end]))
            at = end
        del buffer[:at]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None or kind == CONTINUATION:
            self._continue(kind, flags, stream, payload)
        elif kind == HEADERS:
            block = _unpadded(flags, payload)[5 if flags & HAS_PRIORITY else 0 :]
            if flags & ENDS_HEADERS:
                self._open(stream, flags, block)
            else:
                self._block = stream, flags, bytearray(block)
        elif kind == DATA:
            self._gather(stream, flags, payload)
        elif kind == SETTINGS and not flags & ACKNOWLEDGES:
            self._set(payload)
        elif kind == PING and not flags & ACKNOWLEDGES:
            self._transport.write(frame(PING, ACKNOWLEDGES, 0, payload))
        elif kind == WINDOW:
            self._widen(stream, int.from_bytes(payload) & _HIGHEST)
        elif kind == RESET and (found := self._streams.pop(stream, None)) is not None:
            found.end()

    def _continue(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is None or kind != CONTINUATION or stream != self._block[0]:
            raise ValueError("header fields are cut off")
        _, first, block = self._block
        block += payload
        if len(block) > _MOST_FIELDS:
            raise ValueError("header fields without an end")
        if flags & ENDS_HEADERS:
            self._block = None
            self._open(stream, first, bytes(block))

    def _open(self, stream: int, flags: int, block: bytes) -> None:
        asked = self._fields.meaning(block, read, _known)
        if not stream % 2 or stream <= self._newest:
            raise ValueError("a stream has the number of an earlier one")
        self._newest = stream
        if len(self._streams) >= MOST_CALLS:
            self._transport.write(frame(RESET, 0, stream, _REFUSED.to_bytes(4)))
            return
        found = self._streams[stream] = _Stream(
            asked if isinstance(asked, Failure) else Call(*asked), self._initial_window
        )
        if flags & ENDS_STREAM:
            self._begin(stream, found)

    def _gather(self, stream: int, flags: int, payload: bytes) -> None:
        self._taken += len(payload)
        if self._taken >= _WINDOW // 2:
            self._transport.write(frame(WINDOW, 0, 0, self._taken.to_bytes(4)))
            self._taken = 0
        found = self._streams.get(stream)
        if found is None or found.task is not None:
            return  # of one that is over
        if isinstance(found.asked, Call):
            found.body += _unpadded(flags, payload)
            found.asked = refusal(found.body) or found.asked
        if flags & ENDS_STREAM or isinstance(found.asked, Failure):
            self._begin(stream, found)
            return
        found.taken += len(payload)
        if found.taken >= _WINDOW // 2:
            self._transport.write(frame(WINDOW, 0, stream, found.taken.to_bytes(4)))
            found.taken = 0

    def _set(self, payload: bytes) -> None:
        for at in range(0, len(payload) - 5, 6):
            if int.from_bytes(payload[at : at + 2]) == INITIAL_WINDOW:
                window = int.from_bytes(payload[at + 2 : at + 6])
                for each in self._streams.values():
                    each.window += window - self._initial_window
                self._initial_window = window
        self._transport.write(frame(SETTINGS, ACKNOWLEDGES, 0, b""))
        self._send_more()

    def _widen(self, stream: int, more: int) -> None:
        if stream == 0:
            self._may_send += more
        elif stream in self._streams:
            self._streams[stream].window += more
        self._send_more()

    # What goes

    def _begin(self, stream: int, found: _Stream) -> None:
        """All of the request is here. In a context of its own, as gRPC's calls; at once as far as it can."""
        if isinstance(found.asked, Failure):
            self._fail(stream, found.asked)
            return
        work = self._serve(stream, found, found.asked)
        loop, context = asyncio.get_running_loop(), contextvars.Context()
        found.task = asyncio.Task(work, loop=loop, context=context, eager_start=True)

    async def _serve(self, stream: int, found: _Stream, call: Call) -> None:
        told: bytes | Failure = _CANCELLED
        try:
            told = await answer(self._find, call, found.body, partial(self._say, stream))
        finally:
            self._tell(stream, found, told)
        while found.unsent:  # until then the call is not over for who waits for the last of them
            await self._room(found)

    async def _say(self, stream: int, message: bytes) -> None:
        """Raises CancelledError if nobody waits for it any more."""
        while (found := self._streams.get(stream)) is not None:
            if not found.unsent and not self._is_held:
                found.unsent = memoryview(message)
                self._send(stream, found)
                return
            await self._room(found)
        raise asyncio.CancelledError

    async def _room(self, found: _Stream) -> None:
        found.room = asyncio.get_running_loop().create_future()
        await found.room

    def _tell(self, stream: int, found: _Stream, told: bytes | Failure) -> None:
        if self._streams.get(stream) is not found:
            found.unsent = memoryview(b"")  # nobody waits for it
            return
        if not isinstance(told, Failure):
            found.end_of_answer = _ALL_WENT_WELL
            if told:
                found.unsent = memoryview(told)
        elif found.has_begun:
            found.end_of_answer = encode(told.fields(has_begun=True))
        else:
            self._fail(stream, told)
            return
        self._send(stream, found)

    def _fail(self, stream: int, failure: Failure) -> None:
        del self._streams[stream]
        self._transport.write(_last(stream, encode(failure.fields(has_begun=False))))

    def _send_more(self) -> None:
        for stream, found in tuple(self._streams.items()):
            if found.unsent:
                self._send(stream, found)

    def _send(self, stream: int, found: _Stream) -> None:
        """As much of the answer as there is room for; for the next, others come first."""
        length = max(0, min(self._may_send, found.window, len(found.unsent)))
        parts = [found.unsent[at : min(at + MAX_FRAME, length)] for at in range(0, length, MAX_FRAME)]
        frames = [frame(DATA, 0, stream, part) for part in parts]
        if not found.has_begun:
            found.has_begun = True
            frames.insert(0, frame(HEADERS, ENDS_HEADERS, stream, _ANSWER))
        self._may_send -= length
        found.window -= length
        found.unsent = found.unsent[length:]
        self._streams[stream] = self._streams.pop(stream)
        if not found.unsent:
            found.tell_of_room()
            if found.end_of_answer:
                del self._streams[stream]
                frames.append(_last(stream, found.end_of_answer))
        self._transport.write(b"".join(frames))


def _last(stream: int, block: bytes) -> bytes:
    """The frames of header fields that end a stream."""
    frames, flags = [], ENDS_STREAM
    for kind, at in ((CONTINUATION if at else HEADERS, at) for at in range(0, len(block), MAX_FRAME)):
        ends = ENDS_HEADERS if at + MAX_FRAME >= len(block) else 0
        frames.append(frame(kind, flags | ends, stream, block[at : at + MAX_FRAME]))
        flags = 0
    return b"".join(frames)


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & IS_PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ValueError("more padding than there is room for")
    return payload[1 : len(payload) - payload[0]]
