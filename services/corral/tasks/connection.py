"""The asyncio side of the frames that shims and the zygote speak (corral.shim.wire).

A request is on its way as soon as request() returns, so requests can be pipelined; each reply settles its own future.
"""

import asyncio
import contextvars
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import cast

from corral.rpc.errors import (
    AlreadyExists,
    CorralError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from corral.shim.wire import Channel, Message, ProtocolError
from corral.tasks.model import mapping, optional_int

_KINDS: Mapping[str, type[CorralError]] = MappingProxyType(
    {
        "invalid_argument": InvalidArgument,
        "not_found": NotFound,
        "already_exists": AlreadyExists,
        "failed_precondition": FailedPrecondition,
        "permission_denied": PermissionDenied,
        "resource_exhausted": ResourceExhausted,
        "unavailable": Unavailable,
        "internal": Internal,
        "unimplemented": Unimplemented,
        "exec_not_found": NotFound,
        "exec_denied": PermissionDenied,
    }
)
# Kinds that are finer than ours are told apart by reason.
_REASONS: Mapping[str, str] = MappingProxyType({"exec_not_found": "EXEC_NOT_FOUND", "exec_denied": "EXEC_DENIED"})


class ConnectionLostError(Exception):
    """The peer is gone, or spoke nonsense; what was asked of it may have happened or not."""


class Connection:
    """One socket; owns it. Use within one event loop."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_event: Callable[[Message], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """on_event gets each message that is no reply, in order; on_close is called once, if the peer is gone before
        close() was called."""
        sock.setblocking(False)
        self._channel = Channel(sock)
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._on_event, self._on_close = on_event, on_close
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._next_id = 0
        self._unsent_fds: list[int] = []
        self.is_open = True
        # What comes in belongs to no call, least of all to the one that happened to connect.
        contextvars.Context().run(self._loop.add_reader, self._fd, self._readable)

    def request(self, op: str, fields: Message, fds: Sequence[int] = ()) -> asyncio.Future[Message]:
        """Send a request; the future holds what its reply calls `ok`. Takes over `fds` and closes them in any case.

        The future raises CorralError if the peer refuses, ConnectionLostError.
        """
        self._next_id += 1
        future: asyncio.Future[Message] = self._loop.create_future()
        self._replies[self._next_id] = future
        try:
            self.send({"id": self._next_id, "op": op, **fields}, fds)
        except ProtocolError as e:
            del self._replies[self._next_id]
            _fail(future, InvalidArgument(f"this is too much for one {op!r}: {e}", reason="TOO_LARGE"))
        return future

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message that has no reply; if that fails the connection is lost.

        Raises ProtocolError, with nothing sent, if the message is too large.
        """
        self._unsent_fds += fds
        try:
            if not self.is_open:
                raise EOFError
            self._channel.send(message, fds)
        except EOFError as e:
            self._lose(str(e))
            return
        except ProtocolError:
            if not self._channel.unsent:
                self._close_sent_fds()
            raise
        if self._channel.unsent:
            self._loop.add_writer(self._fd, self._writable)
        else:
            self._close_sent_fds()

    def close(self) -> None:
        """Close the socket; every reply still awaited raises ConnectionLostError. Harmless when repeated."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._channel.close()
        self._close_sent_fds()
        self._fail_replies("closed")

    def _readable(self) -> None:
        # All there is: of a peer that ended with a request unread the loop tells once (ECONNRESET, which uvloop takes
        # for the end of all), and what it said before that lies in front of its end.
        try:
            while self.is_open:
                for message in self._channel.receive():
                    self._dispatch(message)
        except BlockingIOError:
            return
        except (EOFError, ProtocolError) as e:
            self._lose(str(e))

    def _writable(self) -> None:
        try:
            if self._channel.flush():
                self._loop.remove_writer(self._fd)
                self._close_sent_fds()
        except EOFError as e:
            self._lose(str(e))

    def _dispatch(self, message: Message) -> None:
        number = optional_int(message, "id")
        if number is None:
            if self._on_event is not None:
                self._on_event(message)
            return
        future = self._replies.pop(number, None)
        if future is None or future.done():
            return
        if "error" in message:
            _fail(future, _error(mapping(message, "error")))
            return
        reply = cast(Message, mapping(message, "ok"))
        names = reply.get("streams")
        if isinstance(names, list):  # descriptors came along, one for each; whoever asked owns them
            reply["streams"] = dict(zip(names, self._channel.take_fds(len(names)), strict=True))
        future.set_result(reply)

    def _lose(self, why: str) -> None:
        self._close_sent_fds()
        if self.is_open:
            self.close()
            if self._on_close is not None:
                self._on_close()
        self._fail_replies(why)

    def _fail_replies(self, why: str) -> None:
        replies, self._replies = self._replies, {}
        for future in replies.values():
            if not future.done():
                _fail(future, ConnectionLostError(why or "the peer ended"))

    def _close_sent_fds(self) -> None:
        fds, self._unsent_fds = self._unsent_fds, []
        for fd in fds:
            os.close(fd)


def _error(error: Mapping[str, object]) -> CorralError:
    kind = str(error.get("kind"))
    return _KINDS.get(kind, Internal)(str(error.get("message") or kind), reason=_REASONS.get(kind, ""))


def _fail(future: asyncio.Future[Message], error: Exception) -> None:
    """Not everybody waits for every reply; asyncio complains about failures that nobody looked at."""
    future.set_exception(error)
    future.exception()
