"""Calls over one gRPC channel: the namespace goes along, and every failure is a kind of CorralError.

Where no call fails, neither errors nor attempts are needed; the command then does not load them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import grpc

from corral.client.local_channel import LocalChannel
from corral.rpc import attempts, errors
from corral.rpc.address import OPTIONS, Target, Tls
from corral.rpc.metadata import NAMESPACE_KEY

if TYPE_CHECKING:
    from corral.rpc.attempts import Attempts


class Transport:
    """A channel for ordinary code."""

    is_brief = False
    """Whether it is for a program that ends soon, so that to load gRPC's library for a call is too much."""

    def __init__(self, address: str, namespace: str, tls: Tls | None) -> None:
        """Raises InvalidArgument for a malformed address, OSError if a file of `tls` cannot be read."""
        self.address = address
        self._target = Target(address)
        if tls is None or self._target.is_local:
            self.channel = self._open_local(self._target) if self._target.is_local else self._open(self._target)
        else:
            self.channel = grpc.secure_channel(self._target.name, tls.channel_credentials(), secure(OPTIONS))
        self._metadata = ((NAMESPACE_KEY, namespace),)

    def _open(self, target: Target) -> "grpc.Channel":
        return grpc.insecure_channel(target.name, OPTIONS)

    def _open_local(self, target: Target) -> "grpc.Channel":
        path = target.name.removeprefix("unix:")
        return cast("grpc.Channel", LocalChannel(path, partial(self._open, target), is_brief=self.is_brief))

    def unary[Request, Answer](
        self, method: "grpc.UnaryUnaryMultiCallable[Request, Answer]", request: Request
    ) -> Answer:
        """The answer. Raises a kind of CorralError. As AsyncTransport.unary()."""
        again: Attempts | None = None
        while True:
            try:
                return method(request, metadata=self._metadata)
            except grpc.RpcError as e:
                again = again or attempts.Attempts()
                wait_s = pause_s(self.address, e, again)
            time.sleep(wait_s)

    def stream[Request, Answer](
        self,
        method: "grpc.UnaryStreamMultiCallable[Request, Answer]",
        request: Request,
        resume: Callable[[], Request] | None = None,
    ) -> Iterator[Answer]:
        """The answers as they come. Raises a kind of CorralError. As AsyncTransport.stream()."""
        again: Attempts | None = None
        answered = False
        while True:
            call = method(request, metadata=self._metadata)
            try:
                for answer in call:
                    again, answered = None, True
                    yield answer
                return
            except grpc.RpcError as e:
                again = again or attempts.Attempts()
                wait_s = pause_s(self.address, e, again if resume or not answered else None)
            finally:
                call.cancel()
            if resume is not None and answered:
                request = resume()
            time.sleep(wait_s)

    def gather[Request, Answer](
        self, method: "grpc.StreamUnaryMultiCallable[Request, Answer]", requests: Iterator[Request]
    ) -> Answer:
        """The answer to all of `requests`. Raises a kind of CorralError."""
        try:
            return method(requests, metadata=self._metadata)
        except grpc.RpcError as e:
            raise errors.from_rpc_error(e, address=self.address) from e

    def exchange[Request, Answer](
        self, method: "grpc.StreamStreamMultiCallable[Request, Answer]", requests: Iterator[Request]
    ) -> "Exchange[Answer]":
        """A conversation: `requests` are sent as they come, its answers are iterated."""
        return Exchange(method(requests, metadata=self._metadata), self.address)

    def ask[Request, Answer](
        self, method: "grpc.StreamStreamMultiCallable[Request, Answer]", request: Request
    ) -> "Exchange[Answer]":
        """A conversation in which nothing more is said than `request`. Its answers are to be read at once."""
        return self.exchange(method, iter((request,)))

    def close(self) -> None:
        """Ends the channel and what still runs on it."""
        self.channel.close()
        self._target.close()


class BriefTransport(Transport):
    """For a program that ends soon."""

    is_brief = True


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
                raise errors.from_rpc_error(e, address=self._address) from e
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        """Ends the conversation; any thread may call it."""
        self._cancelled = True
        self._call.cancel()


def pause_s(address: str, e: "grpc.RpcError", again: "Attempts | None") -> float:
    """How long to wait before another attempt. Raises what the failure stands for if there is none."""
    error = errors.from_rpc_error(e, address=address)
    if again is None:
        raise error from e
    error.__cause__ = e
    return again.pause_s(error)


def secure(options: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """With TLS the server's name is what its certificate is checked for."""
    return [option for option in options if option[0] != "grpc.default_authority"]
