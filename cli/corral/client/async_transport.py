"""Calls over one gRPC channel, for asyncio: as corral.client.transport, which loads neither asyncio nor grpc.aio."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from corral.client.transport import pause_s, secure
from corral.rpc.address import OPTIONS, Target, Tls
from corral.rpc.attempts import Attempts
from corral.rpc.errors import from_rpc_error
from corral.rpc.metadata import NAMESPACE_KEY


class AsyncTransport:
    """A channel for asyncio."""

    def __init__(self, address: str, namespace: str, tls: Tls | None) -> None:
        """Raises InvalidArgument for a malformed address, OSError if a file of `tls` cannot be read."""
        self.address = address
        self._target = Target(address)
        if tls is None or self._target.is_local:
            self.channel = grpc.aio.insecure_channel(self._target.name, OPTIONS)
        else:
            self.channel = grpc.aio.secure_channel(self._target.name, tls.channel_credentials(), secure(OPTIONS))
        self._metadata = ((NAMESPACE_KEY, namespace),)

    async def unary[Request, Answer](
        self, method: "grpc.aio.UnaryUnaryMultiCallable[Request, Answer]", request: Request
    ) -> Answer:
        """The answer. Raises a kind of CorralError.

        A call that was not served because the daemon just executes itself anew is made again, here and in stream().
        """
        attempts = Attempts()
        while True:
            try:
                return await method(request, metadata=self._metadata)
            except grpc.RpcError as e:
                wait_s = pause_s(self.address, e, attempts)
            await asyncio.sleep(wait_s)

    async def stream[Request, Answer](
        self,
        method: "grpc.aio.UnaryStreamMultiCallable[Request, Answer]",
        request: Request,
        resume: Callable[[], Request] | None = None,
    ) -> AsyncIterator[Answer]:
        """The answers as they come. Raises a kind of CorralError.

        `resume` changes the request, once some answers have come, to one for the rest.
        """
        attempts, answered = Attempts(), False
        while True:
            call = method(request, metadata=self._metadata)
            try:
                async for answer in call:
                    attempts, answered = Attempts(), True
                    yield answer
                return
            except grpc.RpcError as e:
                wait_s = pause_s(self.address, e, attempts if resume or not answered else None)
            finally:
                call.cancel()
            if resume is not None and answered:
                request = resume()
            await asyncio.sleep(wait_s)

    async def gather[Request, Answer](
        self, method: "grpc.aio.StreamUnaryMultiCallable[Request, Answer]", requests: AsyncIterator[Request]
    ) -> Answer:
        """The answer to all of `requests`. Raises a kind of CorralError."""
        try:
            return await method(requests, metadata=self._metadata)
        except grpc.RpcError as e:
            raise from_rpc_error(e, address=self.address) from e

    def exchange[Request, Answer](
        self, method: "grpc.aio.StreamStreamMultiCallable[Request, Answer]", requests: AsyncIterator[Request]
    ) -> "AsyncExchange[Answer]":
        """A conversation: `requests` are sent as they come, its answers are iterated."""
        return AsyncExchange(method(requests, metadata=self._metadata), self.address)

    def ask[Request, Answer](
        self, method: "grpc.aio.StreamStreamMultiCallable[Request, Answer]", request: Request
    ) -> "AsyncExchange[Answer]":
        """A conversation in which nothing more is said than `request`."""
        return self.exchange(method, _alone(request))

    async def close(self) -> None:
        """Ends the channel and what still runs on it."""
        await self.channel.close()
        self._target.close()


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


async def _alone[Request](request: Request) -> AsyncIterator[Request]:
    yield request
