"""One call of corral.rpc.brief: what its header fields ask for, and how it ends. Source: gRPC over HTTP2."""

import asyncio
import binascii
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import grpc
import structlog

from corral.rpc.address import MAX_MESSAGE_BYTES
from corral.rpc.hpack import Field
from corral.rpc.local import Handler, Metadata
from corral.rpc.local_call import Aborted, CallContext, parsed, serialised

log = structlog.get_logger()

type Find = Callable[[str], Handler | None]
type Say = Callable[[bytes], Awaitable[None]]
"""Sends a message, with its prefix, of several; waits for room."""

PREFIX_BYTES = 5
"""Of a message: whether it is compressed, and its length."""
FIELD_BYTES = 32
"""What a header field counts beside its letters. Source: RFC 9113, 6.5.2."""
MOST_FIELDS_BYTES = 16 << 10
"""Of a call, as the library's."""
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_PLAIN = bytes(each for each in range(0x20, 0x7F) if each != ord("%"))
_NOT_OURS = frozenset(("te", "content-type", "user-agent"))


BEGINNING: Sequence[Field] = ((b":status", b"200"), (b"content-type", b"application/grpc"))
"""Of an answer."""


class Failure(NamedTuple):
    """How a call ends that has no answer."""

    code: grpc.StatusCode
    details: str
    trailers: Metadata = ()

    def fields(self, *, has_begun: bool) -> Sequence[Field]:
        """As header fields: of all that is answered, or of what follows an answer that has begun."""
        number, _ = self.code.value
        return (
            *(() if has_begun else BEGINNING),
            (b"grpc-status", str(number).encode()),
            (b"grpc-message", quote_from_bytes(self.details.encode("utf-8", "replace"), safe=_PLAIN).encode()),
            *((key.encode(), _encoded(value)) for key, value in self.trailers),
        )


class Call(CallContext):
    """What was asked for; its handler has it as the context."""

    def __init__(self, method: str, metadata: Metadata, timeout_s: float | None) -> None:
        super().__init__(metadata, timeout_s)
        self.method = method
        self.timeout_s = timeout_s
        self.handler: Handler
        self.say: Say

    async def write(self, message: Any) -> None:
        """For handlers that write their responses."""
        await self.say(_prefixed(serialised(self.handler, message)))

    def peer(self) -> str:
        """Who only listens is not to be sent away: gRPC's client (1.85) would wait for good, as for a moment nobody is
        to be found at this socket. Ours listens at the other one."""
        return "brief:" if self.handler.unary_stream else "unix:"


class Asked(NamedTuple):
    """What a client's header fields say."""

    method: str
    metadata: Metadata
    timeout_s: float | None


def read(fields: Sequence[Field]) -> Asked | Failure:
    """What a client asks for."""
    method, timeout_s, metadata = "", None, []
    size = sum(len(name) + len(value) + FIELD_BYTES for name, value in fields)
    if size > MOST_FIELDS_BYTES:
        text = f"received metadata size exceeds hard limit ({size} vs. {MOST_FIELDS_BYTES})"
        return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
    for name, value in fields:
        key = name.decode("ascii", "replace")
        if key == ":path":
            method = value.decode("utf-8", "replace")
        elif key == "grpc-timeout":
            found = _TIMEOUT.fullmatch(value.decode("ascii", "replace"))
            if found is None:
                return Failure(grpc.StatusCode.INTERNAL, "its timeout is malformed")
            timeout_s = int(found[1]) * _UNITS_S[found[2]]
        elif key == "grpc-encoding" and value != b"identity":
            return Failure(grpc.StatusCode.UNIMPLEMENTED, "compressed messages are not read here")
        elif not key.startswith((":", "grpc-")) and key not in _NOT_OURS:
            metadata.append((key, _decoded(key, value)))
    return Asked(method, tuple(metadata), timeout_s)


def refusal(body: bytearray) -> Failure | None:
    """Of as much of a request as has come. Whoever has another one to send may wait for an answer before the end."""
    if len(body) < PREFIX_BYTES:
        return None
    length = int.from_bytes(body[1:PREFIX_BYTES])
    if length > MAX_MESSAGE_BYTES:
        text = f"SERVER: Received message larger than max ({length} vs. {MAX_MESSAGE_BYTES})"
        return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
    if len(body) > PREFIX_BYTES + length:
        return Failure(grpc.StatusCode.UNIMPLEMENTED, "calls with many requests are served at gRPC's own socket")
    return None


async def answer(find: Find, call: Call, body: bytearray, say: Say) -> bytes | Failure:
    """The answer as a message, with its prefix; of several nothing, once all were said."""
    if len(body) < PREFIX_BYTES or body[0] or int.from_bytes(body[1:PREFIX_BYTES]) != len(body) - PREFIX_BYTES:
        return Failure(grpc.StatusCode.INTERNAL, "what came is not one request, as it is")
    handler = find(call.method)
    if handler is None:
        return Failure(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    call.handler, call.say = handler, say
    try:
        if call.timeout_s is None:
            return await _answered(handler, call, bytes(body[PREFIX_BYTES:]))
        async with asyncio.timeout(call.timeout_s):
            return await _answered(handler, call, bytes(body[PREFIX_BYTES:]))
    except TimeoutError:
        return Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    except Aborted as e:
        return Failure(e.code, e.details, e.trailers)
    except Exception as e:  # every call ends with a status
        log.exception("brief.failed", method=call.method)
        return Failure(grpc.StatusCode.INTERNAL, f"{type(e).__name__}: {e}")


async def _answered(handler: Handler, call: Call, data: bytes) -> bytes:
    """What streams was wrapped by corral.rpc.interceptor, and so writes its responses."""
    request = parsed(handler, data)
    asked = _alone(request) if handler.request_streaming else request
    behaviour: Any = getattr(handler, _BEHAVIOURS[handler.request_streaming, handler.response_streaming])
    response = await behaviour(asked, call)
    return b"" if handler.response_streaming else _prefixed(serialised(handler, response))


_BEHAVIOURS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}
"""Of a handler: what it has by whether it takes, and gives, several messages."""


async def _alone(request: Any) -> AsyncIterator[Any]:
    yield request


def _prefixed(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4) + data


def _encoded(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else binascii.b2a_base64(value, newline=False).rstrip(b"=")


def _decoded(key: str, value: bytes) -> str | bytes:
    if not key.endswith("-bin"):
        return value.decode("ascii", "replace")
    try:
        return binascii.a2b_base64(value + b"==")
    except binascii.Error:
        return b""
