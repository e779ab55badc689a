"""Calls without the wire, see corral.rpc.local: what the handler and what the caller get instead of gRPC's objects."""

import asyncio
import contextvars
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import grpc.aio

from corral.rpc.local import Handler, Metadata

# Responses a handler may be ahead of its caller; in a conversation, whose messages may be large, also the other way.
AHEAD = 16
AHEAD_OF_TALK = 4


class CallContext:
    """The part of grpc.aio.ServicerContext that methods with one request use."""

    def __init__(self, metadata: Metadata, timeout_s: float | None) -> None:
        self._metadata = metadata
        self._deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        self.gone = False

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def cancelled(self) -> bool:
        return self.gone

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - asyncio.get_running_loop().time())

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        raise Aborted(code, details, trailing_metadata)


class LocalContext(CallContext):
    """Of a call from within this process."""

    def peer(self) -> str:
        return "local"


class Aborted(grpc.aio.AbortError):
    """How a handler ends its call with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.trailers = trailers


async def _within[T](timeout_s: float | None, work: Coroutine[Any, Any, T]) -> T:
    """Run the handler; its end becomes the AioRpcError that the wire would bring."""
    try:
        if timeout_s is None:
            return await work
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as e:
        raise _status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from e
    except Aborted as e:
        raise _status(e.code, e.details, e.trailers) from None


def _status(code: grpc.StatusCode, details: str, trailers: Metadata = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


def _begun[T](work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    # An empty context: what the caller bound to its own does not travel over the wire either. It runs at once as far as
    # it can: a call that only reads is over before its caller would have begun to wait.
    task = asyncio.Task(work, loop=asyncio.get_running_loop(), context=contextvars.Context(), eager_start=True)
    if task.done():
        _looked_at(task)
    else:
        task.add_done_callback(_looked_at)
    return task


def _looked_at(task: asyncio.Task[Any]) -> None:
    """A failed call that nobody awaits is nobody's problem, as it is over the wire."""
    if not task.cancelled():
        task.exception()


class _InFlight:
    """What both kinds of call share."""

    def __init__(self, context: LocalContext, task: asyncio.Task[Any]) -> None:
        self._context = context
        self._task = task

    def cancel(self) -> bool:
        self._context.gone = True
        return self._task.cancel()

    def cancelled(self) -> bool:
        return self._task.cancelled()

    def done(self) -> bool:
        return self._task.done()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._task.add_done_callback(lambda _: callback(self))


class LocalUnaryCall(_InFlight):
    """A call for one response; behaves as grpc.aio.UnaryUnaryCall where that is used."""

    def __init__(
        self,
        handler: Handler,
        request: bytes,
        deserialize: Callable[[bytes], Any] | None,
        metadata: Metadata,
        timeout_s: float | None,
    ) -> None:
        self._deserialize = deserialize
        self._waiting: list[asyncio.Future[None]] = []
        context = LocalContext(metadata, timeout_s)
        super().__init__(context, _begun(self._respond(handler, request, context, timeout_s)))

    def __await__(self) -> Generator[Any, None, Any]:
        task = self._task
        if not task.done():
            # Not awaited directly: a caller that is cancelled leaves at once, whatever the handler still has to undo.
            over = task.get_loop().create_future()
            self._waiting.append(over)
            try:
                yield from over
            except asyncio.CancelledError:
                self.cancel()
                raise
        data = task.result()
        return self._deserialize(data) if self._deserialize else data

    async def _respond(self, handler: Handler, request: bytes, context: LocalContext, timeout_s: float | None) -> bytes:
        behaviour: Any = handler.unary_unary
        try:
            reply = await _within(timeout_s, behaviour(parsed(handler, request), context))
            return serialised(handler, reply)
        finally:
            for over in self._waiting:  # they learn of it a round of the loop sooner than of the task's end
                if not over.done():  # by the caller's going away
                    over.set_result(None)


def parsed(handler: Handler, request: bytes) -> Any:
    """A request as its handler takes it."""
    return handler.request_deserializer(request) if handler.request_deserializer else request


def serialised(handler: Handler, reply: Any) -> bytes:
    """What a handler returns, as it is sent."""
    data: bytes = handler.response_serializer(reply) if handler.response_serializer else reply
    return data


class Messages:
    """Messages on their way between a handler and its caller. Who puts them waits when it is too far ahead."""

    def __init__(self, ahead: int = AHEAD) -> None:
        self._ahead = ahead
        self._items: deque[bytes] = deque()
        self._ended = self._unwanted = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, item: bytes) -> None:
        while len(self._items) >= self._ahead and not self._unwanted:
            self._room.clear()
            await self._room.wait()
        self._items.append(item)
        self._news.set()

    def end(self) -> None:
        """No more will be put."""
        self._ended = True
        self._news.set()

    def drop(self) -> None:
        """Nobody will get any more: who puts need not wait."""
        self._unwanted = True
        self._room.set()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        item = await self.get()
        if item is None:
            raise StopAsyncIteration
        return item

    async def get(self) -> bytes | None:
        """The next one, or None at the end."""
        while not self._items:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        self._room.set()
        return self._items.popleft()


class StreamContext(LocalContext):
    """For handlers that write their responses instead of yielding them."""

    def __init__(self, metadata: Metadata, timeout_s: float | None, handler: Handler, responses: Messages) -> None:
        super().__init__(metadata, timeout_s)
        self._handler = handler
        self._responses = responses

    async def write(self, message: Any) -> None:
        await self._responses.put(serialised(self._handler, message))


class _LocalStream(_InFlight):
    """A call with a stream of responses."""

    def __init__(
        self,
        handler: Handler,
        behaviour: Any,
        request: Any,
        deserialize: Callable[[bytes], Any] | None,
        metadata: Metadata,
        timeout_s: float | None,
        *,
        ahead: int = AHEAD,
    ) -> None:
        self._deserialize = deserialize
        self._responses = responses = Messages(ahead)
        context = StreamContext(metadata, timeout_s, handler, responses)
        # The task knows the responses but not this object, which is dropped by a caller that lost interest.
        super().__init__(context, _begun(_within(timeout_s, _stream(handler, behaviour, request, context, responses))))
        self._task.add_done_callback(lambda _: responses.end())

    def __del__(self) -> None:
        if not self._task.done() and not self._task.get_loop().is_closed():
            self._task.cancel()

    async def read(self) -> Any:
        try:
            data = await self._responses.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if data is not None:
            return self._deserialize(data) if self._deserialize else data
        self._task.result()  # raises the status, if it is not OK
        return grpc.aio.EOF

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message


class LocalStreamCall(_LocalStream):
    """A call for a stream of responses; behaves as grpc.aio.UnaryStreamCall where that is used."""

    def __init__(
        self,
        handler: Handler,
        request: bytes,
        deserialize: Callable[[bytes], Any] | None,
        metadata: Metadata,
        timeout_s: float | None,
    ) -> None:
        behaviour: Any = handler.unary_stream
        super().__init__(handler, behaviour, parsed(handler, request), deserialize, metadata, timeout_s)


class LocalExchange(_LocalStream):
    """A conversation; behaves as grpc.aio.StreamStreamCall, made without requests, where that is used."""

    def __init__(
        self,
        handler: Handler,
        serialize: Callable[[Any], bytes] | None,
        deserialize: Callable[[bytes], Any] | None,
        metadata: Metadata,
        timeout_s: float | None,
    ) -> None:
        self._serialize = serialize
        self._requests = requests = Messages(AHEAD_OF_TALK)
        behaviour: Any = handler.stream_stream
        asked = (parsed(handler, request) async for request in requests)
        super().__init__(handler, behaviour, asked, deserialize, metadata, timeout_s, ahead=AHEAD_OF_TALK)
        self._task.add_done_callback(lambda _: requests.drop())

    async def write(self, request: Any) -> None:
        """Raises what the call has failed with; InvalidStateError after another end, as grpc.aio does."""
        if self._task.done():
            if not self._task.cancelled() and (error := self._task.exception()) is not None:
                raise error
            raise asyncio.InvalidStateError("the call has ended")
        await self._requests.put(self._serialize(request) if self._serialize else request)

    async def done_writing(self) -> None:
        self._requests.end()


async def _stream(handler: Handler, behaviour: Any, request: Any, context: StreamContext, responses: Messages) -> None:
    result = behaviour(request, context)
    if inspect.isasyncgen(result):
        async with aclosing(result) as replies:
            async for reply in replies:
                await responses.put(serialised(handler, reply))
    else:
        await result
