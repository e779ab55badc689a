"""Client channels that speak corral: calls carry the current namespace and request id, failures are CorralErrors.

A thin wrapper around the multi-callables instead of grpc.aio interceptors: those run each call in a task of its own.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, cast
from weakref import WeakSet

import grpc
import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in its stubs

from corral.rpc import local
from corral.rpc.address import OPTIONS, Target, Tls, parse_address
from corral.rpc.attempts import Attempts
from corral.rpc.context import NAMESPACE_KEY, REQUEST_ID_KEY, current_call
from corral.rpc.errors import Unavailable, from_rpc_error
from corral.rpc.local_call import LocalExchange, LocalStreamCall, LocalUnaryCall

# How long the status of a call may take to come after a message to it has failed; it is there unless much is unread.
END_S = 1.0

type _Serializer = Callable[[Any], bytes]
type _Deserializer = Callable[[bytes], Any]
type _Metadata = Iterable[tuple[str, str | bytes]]


def open_channel(address: str, *, tls: Tls | None = None) -> grpc.aio.Channel:
    """A channel to `unix:///PATH` or `tcp://HOST:PORT`; connects when first used. Use within one event loop.

    Calls with one request to an address that this process itself serves take a short cut, see corral.rpc.local.

    Calls raise subclasses of CorralError instead of AioRpcError, and carry the current namespace and request id
    unless the caller passes metadata with those keys. Raises InvalidArgument for a malformed address.
    """
    parsed = parse_address(address)
    target = Target(parsed)
    if tls is None:
        inner = grpc.aio.insecure_channel(target.name, OPTIONS)
    else:
        options = [option for option in OPTIONS if option[0] != "grpc.default_authority"]
        inner = grpc.aio.secure_channel(target.name, tls.channel_credentials(), options)
    return CorralChannel(inner, target, str(parsed))


class Channels:
    """One channel per address, for a composer whose leaves may all share one."""

    def __init__(self, *, tls: Tls | None = None) -> None:
        self._tls = tls
        self._open: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to `address`; see open_channel."""
        channel = self._open.get(address)
        if channel is None:
            channel = self._open[address] = open_channel(address, tls=self._tls)
        return channel

    async def close(self) -> None:
        """Close them all; calls that still run are cancelled."""
        while self._open:
            _, channel = self._open.popitem()
            await channel.close()


class CorralChannel(grpc.aio.Channel):
    """See open_channel."""

    def __init__(self, inner: grpc.aio.Channel, target: Target, address: str) -> None:
        self._inner = inner
        self._target = target
        self._address = address
        self._here: WeakSet[LocalUnaryCall | LocalStreamCall | LocalExchange] = WeakSet()

    def unary_unary(
        self,
        method: str,
        request_serializer: _Serializer | None = None,
        response_deserializer: _Deserializer | None = None,
        **options: Any,
    ) -> Any:
        inner = self._inner.unary_unary(method, request_serializer, response_deserializer, **options)
        return self._short_cut(inner, LocalUnaryCall, method, request_serializer, response_deserializer)

    def unary_stream(
        self,
        method: str,
        request_serializer: _Serializer | None = None,
        response_deserializer: _Deserializer | None = None,
        **options: Any,
    ) -> Any:
        inner = self._inner.unary_stream(method, request_serializer, response_deserializer, **options)
        return self._short_cut(inner, LocalStreamCall, method, request_serializer, response_deserializer)

    def _short_cut(
        self,
        inner: Callable[..., Any],
        kind: type[LocalUnaryCall | LocalStreamCall],
        method: str,
        serialize: _Serializer | None,
        deserialize: _Deserializer | None,
    ) -> Callable[..., "_Call"]:
        """A call that takes the wire only where it must."""
        over_the_wire, address, here = self._wrapped(inner, _Again), self._address, self._here

        def call(
            request: Any, *, timeout: float | None = None, metadata: _Metadata | None = None, **options: Any
        ) -> _Call:
            handler = local.find(address, method)
            if handler is None:
                return over_the_wire(request, timeout=timeout, metadata=metadata, **options)
            data = serialize(request) if serialize else request
            made = kind(handler, data, deserialize, _with_context(metadata), timeout)
            if not made.done():
                here.add(made)
            return _Call(made, address)

        return call

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(self._inner.stream_unary(*args, **kwargs))

    def stream_stream(
        self,
        method: str,
        request_serializer: _Serializer | None = None,
        response_deserializer: _Deserializer | None = None,
        **options: Any,
    ) -> Any:
        begin = self._inner.stream_stream(method, request_serializer, response_deserializer, **options)
        address, here = self._address, self._here

        def call(
            requests: Any = None, *, timeout: float | None = None, metadata: _Metadata | None = None, **options: Any
        ) -> _Call:
            handler = local.find(address, method) if requests is None else None
            if handler is None:
                inner = begin(requests, timeout=timeout, metadata=_with_context(metadata), **options)
                return _Exchange(inner, request_serializer, address) if requests is None else _Call(inner, address)
            made = LocalExchange(handler, request_serializer, response_deserializer, _with_context(metadata), timeout)
            here.add(made)
            return _Call(made, address)

        return call

    def _wrapped(self, begin: Callable[..., Any], kind: "type[_Call] | None" = None) -> Callable[..., "_Call"]:
        address = self._address

        def call(*args: Any, metadata: _Metadata | None = None, **kwargs: Any) -> _Call:
            again = partial(begin, *args, metadata=_with_context(metadata), **kwargs)
            return _Again(again, address) if kind is _Again else _Call(again(), address)

        return call

    async def close(self, grace: float | None = None) -> None:
        for call in tuple(self._here):
            call.cancel()
        await self._inner.close(grace)
        self._target.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def _with_context(metadata: _Metadata | None) -> tuple[tuple[str, str | bytes], ...]:
    given = tuple(metadata or ())
    call = current_call.get()
    if call is None:
        return given
    own = ((NAMESPACE_KEY, call.namespace), (REQUEST_ID_KEY, call.request_id))
    if not given:
        return own
    keys = {key for key, _ in given}
    return given + tuple(pair for pair in own if pair[0] not in keys)


class _Call:
    """A call in flight, of any of the four kinds; behaves as grpc.aio's, but for the errors it raises."""

    __slots__ = ("_address", "_inner")

    def __init__(self, inner: Any, address: str) -> None:
        self._inner = inner
        self._address = address

    def _error(self, e: grpc.aio.AioRpcError) -> Exception:
        return from_rpc_error(e, address=self._address)

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._inner.__await__())
        except grpc.aio.AioRpcError as e:
            raise self._error(e) from e

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._inner:
                yield message
        except grpc.aio.AioRpcError as e:
            raise self._error(e) from e
        except asyncio.CancelledError:
            self._inner.cancel()  # grpc.aio (1.85) does not where it still waits for the request to be sent
            raise

    async def read(self) -> Any:
        try:
            return await self._inner.read()
        except grpc.aio.AioRpcError as e:
            raise self._error(e) from e
        except asyncio.CancelledError:
            self._inner.cancel()
            raise

    async def write(self, request: Any) -> None:
        try:
            await self._inner.write(request)
        except grpc.aio.AioRpcError as e:
            raise self._error(e) from e

    async def done_writing(self) -> None:
        try:
            await self._inner.done_writing()
        except grpc.aio.AioRpcError as e:
            raise self._error(e) from e

    def cancel(self) -> bool:
        return cast(bool, self._inner.cancel())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Exchange(_Call):
    """A conversation whose requests are written. To grpc.aio (1.85) a message that comes too late is how the call has
    ended, and what the other side said before is not to be read any more; here it is, with its real end."""

    __slots__ = ("_serialize",)

    def __init__(self, inner: Any, serialize: _Serializer | None, address: str) -> None:
        super().__init__(inner, address)
        self._serialize = serialize

    async def write(self, request: Any) -> None:
        """Raises what the call has failed with; InvalidStateError once it has ended otherwise, or if its end is not
        known before all that was said is read."""
        call = self._inner
        if call.done():
            raise await self._end()
        try:
            await call.wait_for_connection()
            data = self._serialize(request) if self._serialize else request
            await call._cython_call.send_serialized_message(data)  # noqa: SLF001  # what write() does
        except grpc.aio.AioRpcError as e:
            raise self._error(e) from e
        except cygrpc.InternalError as e:
            raise await self._end() from e
        except asyncio.CancelledError:
            call.cancel()
            raise

    async def _end(self) -> Exception:
        call = self._inner
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                code = await call.code()
                if code is not grpc.StatusCode.OK and not call.cancelled():
                    trailers, details = await call.trailing_metadata(), await call.details()
                    return self._error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details))
        return asyncio.InvalidStateError("the call has ended")


class _Again(_Call):
    """A call with one request. Where a server that leaves has not begun it, it is made again, for a while."""

    __slots__ = ("_begin",)

    def __init__(self, begin: Callable[[], Any], address: str) -> None:
        super().__init__(begin(), address)
        self._begin = begin

    def __await__(self) -> Generator[Any, None, Any]:
        attempts = Attempts()
        while True:
            try:
                return (yield from super().__await__())
            except Unavailable as e:
                pause_s = attempts.pause_s(e)
            yield from asyncio.sleep(pause_s).__await__()
            self._inner = self._begin()

    async def __aiter__(self) -> AsyncIterator[Any]:
        begun, attempts = False, Attempts()
        while True:
            try:
                async for message in super().__aiter__():
                    begun = True
                    yield message
            except Unavailable as e:
                if begun:
                    raise
                pause_s = attempts.pause_s(e)
            else:
                return
            await asyncio.sleep(pause_s)
            self._inner = self._begin()
