"""What happens around every RPC: its gate, its namespace and request id, and its errors."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing, suppress
from typing import Any

import grpc
import grpc.aio
import structlog

from corral.rpc.context import (
    DEFAULT_NAMESPACE,
    NAMESPACE_KEY,
    REQUEST_ID_KEY,
    Call,
    Followers,
    check_id,
    current_call,
    current_followers,
    new_request_id,
)
from corral.rpc.errors import (
    BROKEN_DISK,
    UNSERVED,
    CorralError,
    Internal,
    Unavailable,
    Unimplemented,
    from_os_error,
    to_status,
)
from corral.rpc.local_call import LocalContext

log = structlog.get_logger()

type _Context = grpc.aio.ServicerContext[Any, Any]
type _Handler = grpc.RpcMethodHandler[Any, Any]

CANCEL_S = ANSWER_S = 1.0
LOOK_S = 0.02
STOPPING = "corral is stopping; try again when it is back"
MOVING = "corral is being upgraded; try again"


class Gate:
    """The door of one hosted service. Calls wait at it until the service has started; they are counted while inside, so
    that the service can be stopped after the last one left."""

    def __init__(self) -> None:
        self._decided = asyncio.Event()
        self._refusal = Unavailable("not started")
        self.is_open = False
        self.inside: set[asyncio.Task[Any]] = set()
        self.visiting: set[asyncio.Task[Any]] = set()
        """Of those, the calls that come from another process."""
        self.answering: set[asyncio.Task[Any]] = set()
        """Calls that have left, and send what they came for."""
        self.followers = Followers()
        self._empty = asyncio.Event()

    def enter(self, task: asyncio.Task[Any], context: object) -> None:
        """The call is to be counted; it may have to wait()."""
        self.inside.add(task)
        if not isinstance(context, LocalContext):
            self.visiting.add(task)

    def leave(self, task: asyncio.Task[Any], context: object) -> None:
        """What the call came for is done."""
        self._forget(task)
        if not isinstance(context, LocalContext):
            self.answering.add(task)
            task.add_done_callback(self.answering.discard)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self.inside.discard(task)
        self.visiting.discard(task)
        self.followers.discard(task)
        if not self.inside:
            self._empty.set()

    def open(self) -> None:
        self.is_open = True
        self._decided.set()

    def shut(self, *, upgrading: bool = False) -> None:
        """Let nobody in any more, also not those who wait."""
        self.is_open = False
        self._refusal = Unavailable(MOVING, reason=UNSERVED) if upgrading else Unavailable(STOPPING, reason="STOPPING")
        self._decided.set()

    def refusal(self, task: "asyncio.Task[Any] | None" = None) -> CorralError:
        """What to tell who comes now, or was cut off: whose call does something may ask again only if it said so."""
        begun = task is not None and task not in self.followers and task not in self.followers.repeatable
        if self._refusal.reason == UNSERVED and begun:
            return Unavailable("corral was upgraded before this was done; see what has become of it", reason="CUT_OFF")
        return self._refusal

    async def wait(self) -> None:
        """Return once the gate is open. Raises Unavailable if it was shut instead."""
        await self._decided.wait()
        if not self.is_open:
            raise self.refusal()

    async def leave_unserved(self, error: CorralError, context: _Context) -> None:
        """Of a call whose client has been told nothing. If `error` is what refuses calls that may be made again, wait
        until the connection ends: how it ends has any client make it again (corral.rpc.farewell), an answer only those
        who know us. Returns at once where it does not."""
        task = asyncio.current_task()
        if error is self._refusal and error.reason == UNSERVED and _may_be_sent_away(context) and task:
            self._forget(task)
            await asyncio.get_running_loop().create_future()

    async def end_of_visits(self, seconds: float) -> set[asyncio.Task[Any]]:
        """Wait for the calls of other processes that are inside now, while the gate stays open, but not for those that
        only follow. Returns which are left after `seconds`."""
        begun, loop = set(self.visiting), asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while left := {task for task in begun & self.visiting if task not in self.followers}:
            if loop.time() >= deadline:
                return left
            # Not for all of them at once: one may only follow from some time on.
            await asyncio.wait(left, timeout=min(LOOK_S, seconds), return_when=asyncio.FIRST_COMPLETED)
        return set()

    async def drain(self, seconds: float, overdue: Collection[asyncio.Task[Any]] = ()) -> None:
        """Wait for the calls inside; cancel those that only follow and the `overdue` now, and what is still there after
        `seconds`. Then for the last answers to be sent, for a moment: a client that does not read may never let us."""
        self.followers.end()
        for task in self.inside.intersection(overdue):
            task.cancel()
        await self._wait_until_empty(seconds)
        for task in tuple(self.inside):
            task.cancel()
        await self._wait_until_empty(CANCEL_S)
        if self.answering:
            await asyncio.wait(self.answering, timeout=ANSWER_S)

    async def _wait_until_empty(self, seconds: float) -> None:
        """Wait until nobody is inside, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.inside:
                    self._empty.clear()
                    await self._empty.wait()


def _may_be_sent_away(context: _Context) -> bool:
    """Whether its connection is one that a word of ours can be written into: not one within this process, nor TLS."""
    peer = context.peer()
    if peer.startswith(("ipv4:", "ipv6:")):
        return b"ssl" not in context.auth_context().get("transport_security_type", ())
    return peer.startswith("unix:")


class CallInterceptor:
    """Wraps each method once, when it is first called. None of gRPC's, which is awaited at every call."""

    def __init__(self, gates: Mapping[str, Gate]) -> None:
        """`gates` by full gRPC service name; services not in it (health, reflection) share one, which is open."""
        self._gates = gates
        self.own_gate = Gate()
        self.own_gate.open()
        self._wrapped: dict[str, _Handler] = {}

    def known(self, method: str) -> _Handler | None:
        """The handler if the method was called before."""
        return self._wrapped.get(method)

    def wrapped(self, method: str, handler: _Handler | None) -> _Handler | None:
        """The handler with all that this module promises around it; the same one each time."""
        known = self._wrapped.get(method)
        if known is None and handler is not None:
            gate = self._gates.get(method.split("/")[1], self.own_gate)
            known = self._wrapped[method] = wrap(handler, method, gate)
        return known


def wrap(handler: _Handler, method: str, gate: Gate) -> _Handler:
    """The same handler with everything that this module promises around it."""
    around = _Around(method, gate)
    if handler.response_streaming:
        fn = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        behaviour: Any = around.generator(fn) if inspect.isasyncgenfunction(fn) else around.coroutine(fn, writes=True)
    else:
        fn = handler.stream_unary if handler.request_streaming else handler.unary_unary
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        behaviour = around.coroutine(fn)
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


class _Around:
    """What to do before and after the behaviour of one method."""

    def __init__(self, method: str, gate: Gate) -> None:
        self._method = method.removeprefix("/")
        self._gate = gate

    def coroutine(self, fn: Any, *, writes: bool = False) -> Callable[[Any, _Context], Awaitable[Any]]:
        """Around a method that returns its response, or writes its responses to the context."""
        if not inspect.iscoroutinefunction(fn):
            fn = self._unimplemented(fn)
        gate = self._gate

        async def behaviour(request: Any, context: _Context) -> Any:
            task = asyncio.current_task()
            assert task is not None
            gate.enter(task, context)
            said = False
            try:
                self._enter(context)
                if not gate.is_open:
                    await gate.wait()
                said = writes
                return await fn(request, context)
            except (Exception, asyncio.CancelledError) as e:  # noqa: BLE001  # every call ends with a status
                await self._fail(context, e, said=said)
            finally:
                gate.leave(task, context)

        return behaviour

    def generator(self, fn: Any) -> Callable[[Any, _Context], Awaitable[Any]]:
        """Around a method that yields its responses, which are written here: gRPC, where a client leaves that reads
        nothing, would leave the generator where it is, and what it has open to the collector of garbage."""
        gate = self._gate

        async def behaviour(request: Any, context: _Context) -> None:
            task = asyncio.current_task()
            assert task is not None
            gate.enter(task, context)
            said = False
            try:
                self._enter(context)
                if not gate.is_open:
                    await gate.wait()
                async with aclosing(fn(request, context)) as responses:
                    async for response in responses:
                        said = True
                        await context.write(response)
            except (Exception, asyncio.CancelledError) as e:  # noqa: BLE001  # every call ends with a status
                await self._fail(context, e, said=said)
            finally:
                gate.leave(task, context)

        return behaviour

    def _unimplemented(self, fn: Any) -> Callable[[Any, _Context], Awaitable[Any]]:
        """For a method that its servicer does not define, so that the generated base class's is found."""
        if not fn.__module__.endswith("_pb2_grpc"):
            raise TypeError(f"{fn.__qualname__} must be an async function: the loop never blocks")
        method = self._method

        async def refuse(_request: Any, _context: _Context) -> Any:
            raise Unimplemented(f"{method} is not there yet in this version of corral", reason="NOT_YET")

        return refuse

    def _enter(self, context: _Context) -> None:
        namespace, request_id = DEFAULT_NAMESPACE, ""
        for key, value in context.invocation_metadata() or ():
            if key == NAMESPACE_KEY:
                namespace = check_id(str(value), "namespace")
            elif key == REQUEST_ID_KEY:
                request_id = check_id(str(value), "request id")
        # Never reset: the task, and its context with it, ends with the call.
        current_call.set(Call(namespace, request_id or new_request_id(), self._method))
        current_followers.set(self._gate.followers)

    async def _fail(self, context: _Context, e: BaseException, *, said: bool) -> None:
        """End the call with the status that `e` stands for. said: some of the answer may have been sent."""
        if isinstance(e, grpc.aio.AbortError):
            raise e
        if isinstance(e, asyncio.CancelledError):
            if self._gate.is_open or context.cancelled():
                raise e  # the client went away
            e = self._gate.refusal(asyncio.current_task())
        if isinstance(e, grpc.aio.InternalError):
            raise asyncio.CancelledError from e  # its connection was gone in the middle of a write
        error = e if isinstance(e, CorralError) else self._translated(e)
        if not said:
            await self._gate.leave_unserved(error, context)
        code, message, trailers = to_status(error)
        await context.abort(code, message, trailers)

    def _translated(self, e: BaseException) -> CorralError:
        """An exception no servicer translated: a full disk speaks for itself, a broken one too, but is logged; the rest
        is our fault."""
        if isinstance(e, OSError):
            error = from_os_error(e, self._method)
            if not isinstance(error, Internal):
                return error
        log.error("rpc.failed", method=self._method, exc_info=e)
        if isinstance(e, OSError) and e.errno in BROKEN_DISK:
            return error
        call = current_call.get()
        return Internal(
            f"{self._method} failed inside corral: {type(e).__name__}: {e}",
            reason="INTERNAL",
            metadata={"request_id": call.request_id if call else ""},
        )
