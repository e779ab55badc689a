"""Calls over one gRPC channel: the namespace goes along, and every failure is a kind of CorralError."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio

from corral.client.address import grpc_target
from corral.rpc.context import NAMESPACE_KEY
from corral.rpc.errors import from_rpc_error

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    # A local socket has no proxy, and the look-up for one costs time at every start.
    ("grpc.enable_http_proxy", 0),
    # A daemon that is restarted is back in less than a second; gRPC would wait for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 200),
)


class AsyncTransport:
    """A channel for asyncio."""

    def __init__(self, address: str, namespace: str) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(grpc_target(address), options=_OPTIONS)
        self._metadata = ((NAMESPACE_KEY, namespace),)

    async def unary[Request, Answer](
        self, method: "grpc.aio.UnaryUnaryMultiCallable[Request, Answer]", request: Request
    ) -> Answer:
        """The answer. Raises a kind of CorralError."""
        try:
            return await method(request, metadata=self._metadata)
        except grpc.RpcError as e:
            raise from_rpc_error(e, address=self.address) from e

    async def stream[Request, Answer](
        self, method: "grpc.aio.UnaryStreamMultiCallable[Request, Answer]", request: Request
    ) -> AsyncIterator[Answer]:
        """The answers as they come. Raises a kind of CorralError."""
        call = method(request, metadata=self._metadata)
        try:
            async for answer in call:
                yield answer
        except grpc.RpcError as e:
            raise from_rpc_error(e, address=self.address) from e
        finally:
            call.cancel()

    def exchange[Request, Answer](
        self, method: "grpc.aio.StreamStreamMultiCallable[Request, Answer]", requests: AsyncIterator[Request]
    ) -> "AsyncExchange[Answer]":
        """A conversation: `requests` are sent as they come, its answers are iterated."""
        return AsyncExchange(method(requests, metadata=self._metadata), self.address)

    async def close(self) -> None:
        """Ends the channel and what still runs on it."""
        await self.channel.close()


class Transport:
    """A channel for ordinary code."""

    def __init__(self, address: str, namespace: str) -> None:
        self.address = address
        self.channel = grpc.insecure_channel(grpc_target(address), options=_OPTIONS)
        self._metadata = ((NAMESPACE_KEY, namespace),)

    def unary[Request, Answer](
        self, method: "grpc.UnaryUnaryMultiCallable[Request, Answer]", request: Request
    ) -> Answer:
        """The answer. Raises a kind of CorralError."""
        try:
            return method(request, metadata=self._metadata)
        except grpc.RpcError as e:
            raise from_rpc_error(e, address=self.address) from e

    def stream[Request, Answer](
        self, method: "grpc.UnaryStreamMultiCallable[Request, Answer]", request: Request
    ) -> Iterator[Answer]:
        """The answers as they come. Raises a kind of CorralError."""
        call = method(request, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as e:
            raise from_rpc_error(e, address=self.address) from e
        finally:
            call.cancel()

    def exchange[Request, Answer](
        self, method: "grpc.StreamStreamMultiCallable[Request, Answer]", requests: Iterator[Request]
    ) -> "Exchange[Answer]":
        """A conversation: `requests` are sent as they come, its answers are iterated."""
        return Exchange(method(requests, metadata=self._metadata), self.address)

    def close(self) -> None:
        """Ends the channel and what still runs on it."""
        self.channel.close()


class AsyncExchange[Answer]:
    """The answers of a conversation. Iterating raises a kind of CorralError, but ends quietly after `cancel`."""

    def __init__(self, call: "grpc.aio.StreamStreamCall[Any, Answer]", address: str) -> None:
        self._call = call
        self._address = address

    async def __aiter__(self) -> AsyncIterator[Answer]:
        try:
            async for answer in self._call:
                yield answer
        except asyncio.CancelledError:
            if not self._call.cancelled():
                raise
        except grpc.RpcError as e:
            raise from_rpc_error(e, address=self._address) from e
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        """Ends the conversation."""
        self._call.cancel()


class Exchange[Answer]:
    """The answers of a conversation. Iterating raises a kind of CorralError, but ends quietly after `cancel`."""

    def __init__(self, call: "grpc._CallIterator[Answer]", address: str) -> None:
        self._call = call
        self._address = address
        self._cancelled = False

    def __iter__(self) -> Iterator[Answer]:
        try:
            yield from self._call
        except grpc.RpcError as e:
            if not self._cancelled:
                raise from_rpc_error(e, address=self._address) from e
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        """Ends the conversation; any thread may call it."""
        self._cancelled = True
        self._call.cancel()
