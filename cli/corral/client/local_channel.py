"""A channel to a unix socket that does without gRPC's library: to load that is a third of what a short command takes.

It makes calls with one answer, one at a time on each connection. What it cannot do it leaves to the library: requests
that do not fit into a window, metadata that has to be refused, and calls with many requests or answers, where somebody
has to read from the connection whatever the caller does: a server that leaves tells those who do.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from corral.client import http2
from corral.client.transport import Transport
from corral.rpc.address import MAX_MESSAGE_BYTES, Target

if TYPE_CHECKING:
    import grpc

    from corral.client.hpack import Field

_HEADERS: "tuple[Field, ...]" = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":authority", b"localhost"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"corral"),
)
_OK = b"200"
_PREFIX_BYTES = 5
"""Of a message: whether it is compressed, and its length. Source: gRPC over HTTP2, Length-Prefixed-Message."""

type Metadata = tuple[tuple[str, str], ...]


class BriefTransport(Transport):
    """For a program that ends soon."""

    def _open(self, target: Target) -> "grpc.Channel":
        library = super()._open
        if not target.is_local:
            return library(target)
        channel = LocalChannel(target.name.removeprefix("unix:"), lambda: library(target))
        return cast("grpc.Channel", channel)


class LocalChannel:
    """As much of a grpc.Channel as stubs and transports need. Calls raise grpc.RpcError."""

    def __init__(self, path: str, open_library: "Callable[[], grpc.Channel]") -> None:
        """open_library: makes one of gRPC's own to the same socket."""
        self._path = path
        self._open_library = open_library
        self._library: grpc.Channel | None = None
        self._opening = Lock()
        self._idle: list[http2.Connection] = []

    def unary_unary(self, method: str, **functions: Any) -> "Callable[..., object]":
        """As of grpc.Channel."""
        serialize, parse = functions["request_serializer"], functions["response_deserializer"]

        def call(request: object, *, metadata: Metadata) -> object:
            data = serialize(request)
            connection = self._connection(data, metadata)
            if connection is None:
                return self.library.unary_unary(method, **functions)(request, metadata=metadata)
            return parse(self._answer(connection, _headers(method, metadata), data))

        return call

    def unary_stream(self, *arguments: Any, **options: Any) -> object:
        """As of grpc.Channel."""
        return self.library.unary_stream(*arguments, **options)

    def stream_unary(self, *arguments: Any, **options: Any) -> object:
        """As of grpc.Channel."""
        return self.library.stream_unary(*arguments, **options)

    def stream_stream(self, *arguments: Any, **options: Any) -> object:
        """As of grpc.Channel."""
        return self.library.stream_stream(*arguments, **options)

    @property
    def library(self) -> "grpc.Channel":
        """One of gRPC's own."""
        self._hang_up()
        with self._opening:
            if self._library is None:
                self._library = self._open_library()
            return self._library

    def close(self) -> None:
        """Harmless when repeated."""
        self._hang_up()
        if self._library is not None:
            self._library.close()

    def _hang_up(self) -> None:
        """Before what may last for long, while nobody would read."""
        while (connection := self._waiting()) is not None:
            connection.close()

    def _waiting(self) -> "http2.Connection | None":
        """One that is idle, which is the caller's from now on."""
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _connection(self, data: bytes, metadata: Metadata) -> "http2.Connection | None":
        """One for this request, None if it is for gRPC's library."""
        if not all(value.isascii() and value.isprintable() for pair in metadata for value in pair):
            return None
        while (connection := self._waiting()) is not None:
            if connection.is_still_usable() and connection.has_room(_PREFIX_BYTES + len(data)):
                return connection
            connection.close()
        try:
            connection = http2.Connection(self._path)
        except http2.NobodyThereError as e:
            raise _failure("UNAVAILABLE", f"failed to connect to all addresses; last error: {e}") from e
        if connection.has_room(_PREFIX_BYTES + len(data)):
            return connection
        connection.close()
        return None

    def _answer(self, connection: "http2.Connection", headers: "Sequence[Field]", data: bytes) -> bytes:
        try:
            answer = _answer(connection, headers, data)
        except BaseException:
            connection.close()
            raise
        if connection.is_usable:
            self._idle.append(connection)
        else:
            connection.close()
        return answer


def _headers(method: str, metadata: Metadata) -> "Sequence[Field]":
    return (*_HEADERS, (b":path", method.encode()), *((key.encode(), value.encode()) for key, value in metadata))


def _answer(connection: "http2.Connection", headers: "Sequence[Field]", data: bytes) -> bytes:
    """Raises grpc.RpcError; what is left on the connection then, nobody knows."""
    body = bytearray()
    try:
        stream = connection.call(headers, b"\0" + len(data).to_bytes(4) + data)
        while True:
            kind, flags, payload = connection.answer(stream)
            if kind == http2.RESET:
                raise _reset(int.from_bytes(payload))
            fields = dict(connection.decode(payload)) if kind == http2.HEADERS else {}
            if kind == http2.DATA:
                body += payload
                _check_length(body)
            if flags & http2.ENDS_STREAM or fields.get(b":status", _OK) != _OK:
                _check(fields)
                return _message(body)
    except http2.GoneAwayError as e:
        raise _failure("UNAVAILABLE", "Stream removed (GOAWAY received)") from e
    except (EOFError, OSError) as e:
        raise _failure("UNAVAILABLE", "Socket closed") from e
    except ValueError as e:
        raise _failure("INTERNAL", str(e)) from e


def _check_length(body: bytearray) -> None:
    """Raises grpc.RpcError."""
    length = int.from_bytes(body[1:_PREFIX_BYTES])
    if len(body) >= _PREFIX_BYTES and length > MAX_MESSAGE_BYTES:
        text = f"CLIENT: Received message larger than max ({length} vs. {MAX_MESSAGE_BYTES})"
        raise _failure("RESOURCE_EXHAUSTED", text)


def _message(body: bytearray) -> bytes:
    """The one that has come. Raises ValueError."""
    if len(body) < _PREFIX_BYTES or body[0] or int.from_bytes(body[1:_PREFIX_BYTES]) != len(body) - _PREFIX_BYTES:
        raise ValueError("what came is not one answer, as it is")
    return bytes(body[_PREFIX_BYTES:])


def _check(trailers: "dict[bytes, bytes]") -> None:
    """Raises grpc.RpcError unless all went well."""
    if trailers.get(b"grpc-status") != b"0":
        from corral.client.call_failed import from_trailers

        raise from_trailers(trailers)


def _failure(code: str, details: str) -> "grpc.RpcError":
    from corral.client.call_failed import CallFailedError

    return CallFailedError(code, details)


def _reset(code: int) -> "grpc.RpcError":
    from corral.client.call_failed import from_reset

    return from_reset(code)
