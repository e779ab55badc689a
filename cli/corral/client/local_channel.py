"""A channel to a unix socket that does without gRPC's library: to load that is a third of what a short command takes,
and a call by it takes half a millisecond more where the server does without it, too (corral.rpc.brief).

It makes calls with one request, one at a time on each connection; those with many answers only where the server does
without the library, too. What it cannot do it leaves to that: requests that do not fit into a window, metadata that has
to be refused, conversations, and what is read for long: somebody has to read from the connection then, whatever the
caller does, for a server that leaves tells those who do.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import length_hint
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

from corral.client import http2
from corral.rpc import frames
from corral.rpc.address import MAX_MESSAGE_BYTES, beside

if TYPE_CHECKING:
    import grpc

    from corral.rpc.hpack import Field

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

type Metadata = Sequence[tuple[str, str]]


class LocalChannel:
    """As much of a grpc.Channel as stubs and transports need. Calls raise grpc.RpcError."""

    def __init__(self, path: str, open_library: "Callable[[], grpc.Channel]", *, is_brief: bool) -> None:
        """open_library: makes one of gRPC's own to the same socket. is_brief: for a program that ends soon, so that
        calls to a server of the library, too, are better made without."""
        self._path = path
        self._beside = beside(path)
        self._is_brief = is_brief
        self._open_library = open_library
        self._library: grpc.Channel | None = None
        self._opening = Lock()
        self._idle: list[http2.Connection] = []
        self._busy: set[http2.Connection] = set()
        self._is_closed = False

    def unary_unary(self, method: str, **functions: Any) -> "Callable[..., object]":
        """As of grpc.Channel."""
        return _UnaryCalls(self, method, functions)

    def call(self, method: str, data: bytes, metadata: Metadata) -> bytes | None:
        """The answer; None of a call that is for the library to make. Raises grpc.RpcError, ValueError if closed."""
        begun = self.begin(method, data, metadata)
        if begun is None:
            return None
        answers = list(begun.answers())
        if len(answers) != 1:
            raise _failure("INTERNAL", f"what came is not one answer, but {len(answers)}")
        return answers[0]

    def begin(self, method: str, data: bytes, metadata: Metadata, *, beside_only: bool = False) -> "_Begun | None":
        """As call(); the answers may be many. beside_only: if the server does without the library."""
        self._check_open()
        connection = self._connection(data, metadata, beside_only=beside_only)
        return None if connection is None else _Begun(self, connection, _headers(method, metadata), data)

    def unary_stream(self, *arguments: Any, **options: Any) -> object:
        """As of grpc.Channel."""
        return self.library.unary_stream(*arguments, **options)

    def stream_unary(self, *arguments: Any, **options: Any) -> object:
        """As of grpc.Channel."""
        return self.library.stream_unary(*arguments, **options)

    def stream_stream(self, method: str, **functions: Any) -> "Callable[..., object]":
        """As of grpc.Channel."""
        return _Conversations(self, method, functions)

    @property
    def library(self) -> "grpc.Channel":
        """One of gRPC's own."""
        self._hang_up()
        with self._opening:
            if self._library is None:
                self._check_open()
                self._library = self._open_library()
            return self._library

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("Cannot invoke RPC on closed channel!")

    def close(self) -> None:
        """Ends what still runs, too. Harmless when repeated."""
        self._is_closed = True
        for connection in tuple(self._busy):
            connection.interrupt()
        self._hang_up(for_good=True)
        if self._library is not None:
            self._library.close()

    def subscribe(self, *arguments: Any, **options: Any) -> object:
        """As of grpc.Channel."""
        return self.library.subscribe(*arguments, **options)

    def unsubscribe(self, *arguments: Any, **options: Any) -> object:
        """As of grpc.Channel."""
        return self.library.unsubscribe(*arguments, **options)

    def _hang_up(self, *, for_good: bool = False) -> None:
        """Before what may last for long, while nobody would read what the library's server says. A program that ends
        soon has few calls to make after that."""
        connections = []
        while (connection := self._waiting()) is not None:
            connections.append(connection)
        for connection in connections:
            if connection.path == self._beside and not (for_good or self._is_brief):
                self._idle.append(connection)
            else:
                connection.close()

    def _waiting(self) -> "http2.Connection | None":
        """One that is idle, which is the caller's from now on."""
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _connection(self, data: bytes, metadata: Metadata, *, beside_only: bool) -> "http2.Connection | None":
        """One for this request, None if it is for gRPC's library."""
        if not all(map(_is_plain, metadata)):
            return None
        while (connection := self._waiting()) is not None:
            is_wanted = connection.path == self._beside or not beside_only
            if is_wanted and connection.is_still_usable() and connection.has_room(_PREFIX_BYTES + len(data)):
                return connection
            connection.close()
        connection = self._connected(beside_only=beside_only)
        if connection is None or connection.has_room(_PREFIX_BYTES + len(data)):
            return connection
        connection.close()
        return None

    def _connected(self, *, beside_only: bool) -> "http2.Connection | None":
        """A new one."""
        try:
            connection = http2.Connection(self._beside)
            if connection.owner() == os.stat(self._path).st_uid:  # noqa: PTH116 - a Path would be made for this alone
                return connection
            connection.close()  # somebody else's: it is in a directory of everybody's
        except (http2.NobodyThereError, OSError):  # in the middle of an upgrade, or it has none
            pass
        if beside_only or not self._is_brief:
            return None
        try:
            return http2.Connection(self._path)
        except http2.NobodyThereError as e:
            raise _failure("UNAVAILABLE", f"failed to connect to all addresses; last error: {e}") from e

    def hold(self, connection: "http2.Connection") -> None:
        """A call is made on it. Raises ValueError if the channel is closed."""
        self._busy.add(connection)
        self._check_open()  # who has closed it since may have seen no call

    def let_go(self, connection: "http2.Connection", *, has_ended: bool) -> None:
        """The call is over; has_ended: by all of its answer, so that the connection may serve for another one."""
        self._busy.discard(connection)
        if has_ended and connection.is_usable:
            self._idle.append(connection)
        else:
            connection.close()
        if self._is_closed:
            self._hang_up(for_good=True)

    def fail(self, e: Exception) -> NoReturn:
        """Raises what a call fails with that this has befallen."""
        if self._is_closed:
            raise _failure("CANCELLED", "Channel closed!") from e
        match e:
            case http2.GoneAwayError():
                raise _failure("UNAVAILABLE", "Stream removed (GOAWAY received)") from e
            case EOFError() | OSError():
                raise _failure("UNAVAILABLE", "Socket closed") from e
            case ValueError():
                raise _failure("INTERNAL", str(e)) from e
        raise e


class _Begun:
    """A call that is made on a connection of its own from now on. Raises grpc.RpcError."""

    def __init__(
        self, channel: LocalChannel, connection: "http2.Connection", headers: "Sequence[Field]", data: bytes
    ) -> None:
        self._channel = channel
        self._connection: http2.Connection | None = connection
        self._uncut = [connection]
        """Taken from here by its end or by who cuts it off, whoever comes first: it may serve for another call."""
        try:
            channel.hold(connection)
            self._stream = connection.call(headers, b"\0" + len(data).to_bytes(4) + data)
        except BaseException as e:
            self._end(has_ended=False)
            if isinstance(e, Exception):
                channel.fail(e)
            raise

    def answers(self) -> Iterator[bytes]:
        """As they come; once."""
        connection, has_ended = self._connection, False
        if connection is None:
            return
        try:
            yield from _answers(connection, self._stream)
            has_ended = True
        except Exception as e:  # noqa: BLE001 - raised as what it means
            self._channel.fail(e)
        finally:
            self._end(has_ended=has_ended)

    def cancel(self) -> None:
        """End it, from any thread."""
        with suppress(IndexError):
            self._uncut.pop().interrupt()

    def __del__(self) -> None:
        """Of one whose answers nobody wants."""
        self._end(has_ended=False)

    def _end(self, *, has_ended: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            self._uncut.pop()
        except IndexError:
            has_ended = False
        self._channel.let_go(connection, has_ended=has_ended)


class _UnaryCalls:
    """As a grpc.UnaryUnaryMultiCallable. What has a deadline or options, or is not waited for, is for the library."""

    def __init__(self, channel: LocalChannel, method: str, functions: dict[str, Any]) -> None:
        self._channel = channel
        self._method = method
        self._functions = functions

    def __call__(
        self, request: object, timeout: float | None = None, metadata: Metadata | None = None, **options: Any
    ) -> object:
        if timeout is None and not options:
            answer = self._channel.call(self._method, self._functions["request_serializer"](request), metadata or ())
            if answer is not None:
                return self._functions["response_deserializer"](answer)
        return self._made()(request, timeout=timeout, metadata=tuple(metadata or ()), **options)

    def with_call(self, *arguments: Any, **options: Any) -> object:
        """As of the library."""
        return self._made().with_call(*arguments, **options)

    def future(self, *arguments: Any, **options: Any) -> object:
        """As of the library."""
        return self._made().future(*arguments, **options)

    def _made(self) -> "grpc.UnaryUnaryMultiCallable[Any, Any]":
        return self._channel.library.unary_unary(self._method, **self._functions)


class _Conversations:
    """As a grpc.StreamStreamMultiCallable. Who has more than one request to send is for the library."""

    def __init__(self, channel: LocalChannel, method: str, functions: dict[str, Any]) -> None:
        self._channel = channel
        self._method = method
        self._functions = functions

    def __call__(self, requests: Iterator[object], metadata: Metadata | None = None, **options: Any) -> object:
        if options or length_hint(requests) != 1:
            return self._made()(requests, metadata=tuple(metadata or ()), **options)
        request = next(requests)

        def by_library() -> Any:
            return self._made()(iter((request,)), metadata=tuple(metadata or ()))

        data = self._functions["request_serializer"](request)
        begun = self._channel.begin(self._method, data, metadata or (), beside_only=True)
        if begun is None:
            return by_library()
        return _Answers(begun, self._functions["response_deserializer"], by_library)

    def _made(self) -> "grpc.StreamStreamMultiCallable[Any, Any]":
        return self._channel.library.stream_stream(self._method, **self._functions)


class _Answers:
    """As a grpc._CallIterator, as far as it is read: once."""

    def __init__(self, begun: _Begun, parse: Callable[[bytes], object], by_library: Callable[[], Any]) -> None:
        """by_library: makes the call anew, if the server has left and not begun it."""
        self._call: Any = begun
        self._begun, self._parse, self._by_library = begun, parse, by_library
        self._is_cancelled = False

    def __iter__(self) -> Iterator[object]:
        try:
            yield from map(self._parse, self._begun.answers())
        except Exception as e:
            if not isinstance(e.__cause__, http2.GoneAwayError) or self._is_cancelled:
                raise
            self._call = self._by_library()
            if self._is_cancelled:
                self._call.cancel()  # type: ignore[unreachable]  # by another thread, meanwhile
        if self._call is not self._begun:
            yield from self._call

    def cancel(self) -> None:
        """End it, from any thread."""
        self._is_cancelled = True
        self._call.cancel()


def _is_plain(pair: tuple[str, str | bytes]) -> bool:
    """Whether it is sent as it is; the library knows what to do with another."""
    key, value = pair
    if not isinstance(value, str) or not key.islower() or key.startswith("grpc-"):
        return False
    return key.isascii() and key.isprintable() and value.isascii() and value.isprintable()


def _headers(method: str, metadata: Metadata) -> "Sequence[Field]":
    return (*_HEADERS, (b":path", method.encode()), *((key.encode(), value.encode()) for key, value in metadata))


def _answers(connection: "http2.Connection", stream: int) -> Iterator[bytes]:
    """Raises grpc.RpcError, and what the connection raises; what is left on it then, nobody knows."""
    body = bytearray()
    while True:
        kind, flags, payload = connection.answer(stream)
        if kind == frames.RESET:
            raise _reset(int.from_bytes(payload))
        fields = connection.decode(payload) if kind == frames.HEADERS else {}
        if kind == frames.DATA:
            body += payload
            while (message := _taken(body)) is not None:
                yield message
        if flags & frames.ENDS_STREAM or fields.get(b":status", _OK) != _OK:
            _check(fields)
            if body:
                raise ValueError("what came last is no whole answer")
            return


def _taken(body: bytearray) -> bytes | None:
    """The first message that is there wholly. Raises grpc.RpcError, ValueError."""
    if len(body) < _PREFIX_BYTES:
        return None
    length = int.from_bytes(body[1:_PREFIX_BYTES])
    if length > MAX_MESSAGE_BYTES:
        text = f"CLIENT: Received message larger than max ({length} vs. {MAX_MESSAGE_BYTES})"
        raise _failure("RESOURCE_EXHAUSTED", text)
    if body[0]:
        raise ValueError("what came is compressed")
    end = _PREFIX_BYTES + length
    if len(body) < end:
        return None
    message = bytes(memoryview(body)[_PREFIX_BYTES:end])
    del body[:end]
    return message


def _check(trailers: Mapping[bytes, bytes]) -> None:
    """Raises grpc.RpcError unless all went well."""
    if trailers.get(b"grpc-status") != b"0":
        from corral.client.call_failed import from_trailers

        raise from_trailers(dict(trailers))


def _failure(code: str, details: str) -> "grpc.RpcError":
    from corral.client.call_failed import CallFailedError

    return CallFailedError(code, details)


def _reset(code: int) -> "grpc.RpcError":
    from corral.client.call_failed import from_reset

    return from_reset(code)
