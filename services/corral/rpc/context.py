"""Who is calling: the namespace and the request id of the call that is being served.

Both travel as gRPC metadata. The server interceptor sets them once per call; code below reads them, and channels of
corral.rpc.channel forward them, so one request id names the whole tree of calls that a user's command caused.
"""

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from corral.rpc import metadata
from corral.rpc.errors import InvalidArgument

NAMESPACE_KEY = metadata.NAMESPACE_KEY
REQUEST_ID_KEY = metadata.REQUEST_ID_KEY
DEFAULT_NAMESPACE = "default"
ID_PATTERN = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


class Call(NamedTuple):
    """One RPC being served, or code run on behalf of one."""

    namespace: str
    request_id: str
    method: str = ""


# The log processor of corral.daemon reads this too: one variable set per call costs less than binding each key.
current_call: ContextVar[Call | None] = ContextVar("corral_call", default=None)


class Followers:
    """The calls of one service that only_follows() was called in."""

    def __init__(self) -> None:
        self._ends: dict[asyncio.Task[Any], Callable[[], None]] = {}
        self._over = False
        self.repeatable: set[asyncio.Task[Any]] = set()
        """Calls that do something, and that may_be_repeated() was called in."""

    def __contains__(self, task: asyncio.Task[Any]) -> bool:
        return task in self._ends

    def add(self, task: asyncio.Task[Any], end: Callable[[], None]) -> None:
        """One that says so only now may be too late to follow anything."""
        self._ends[task] = end
        if self._over:
            end()

    def discard(self, task: asyncio.Task[Any]) -> None:
        """It has ended."""
        self._ends.pop(task, None)
        self.repeatable.discard(task)

    def end(self) -> None:
        """All of them, and those that come."""
        self._over = True
        for end in tuple(self._ends.values()):
            end()


# Of the service that is called; set by the server interceptor.
current_followers: ContextVar[Followers | None] = ContextVar("corral_followers", default=None)


def only_follows(end: Callable[[], None] | None = None) -> None:
    """Say of the call being served that it merely watches, for as long as the client likes: events, logs, a wait.

    Such a call is ended at once when its service is asked to stop; other calls get time to finish their work. `end` is
    called for that, and the call then raises CancelledError itself; else it is cancelled.
    """
    followers, task = current_followers.get(), asyncio.current_task()
    if followers is not None and task is not None:
        followers.add(task, end or partial(_cancel, task))


def may_be_repeated() -> None:
    """Say of the call being served that it finds what it has done already when it is made again: its client may do that
    if an upgrade cuts it off."""
    followers, task = current_followers.get(), asyncio.current_task()
    if followers is not None and task is not None:
        followers.repeatable.add(task)


def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()


def current_namespace() -> str:
    """The namespace of the call being served; `default` outside of any call."""
    call = current_call.get()
    return DEFAULT_NAMESPACE if call is None else call.namespace


def current_request_id() -> str:
    """The request id of the call being served; empty outside of any call."""
    call = current_call.get()
    return "" if call is None else call.request_id


def new_request_id() -> str:
    """An id no other request has, in practice."""
    return os.urandom(8).hex()


@contextmanager
def in_namespace(namespace: str, *, request_id: str = "") -> Iterator[None]:
    """Act on behalf of `namespace`, for work that no RPC started (recovery, restart policies, timers)."""
    token = current_call.set(Call(check_namespace(namespace), request_id or current_request_id() or new_request_id()))
    try:
        yield
    finally:
        current_call.reset(token)


def check_id(value: str, what: str) -> str:
    """`value`, if it is a valid id and so a safe path component; `what` names it in the error.

    Raises InvalidArgument.
    """
    if ID_PATTERN.fullmatch(value) is None:
        problem = "is empty" if not value else f"{value[:140]!r} is not valid"
        raise InvalidArgument(
            f"{what} {problem}: it must begin with a letter or digit,"
            " followed by at most 127 letters, digits, '_', '.' or '-'",
            reason="BAD_ID",
            metadata={"what": what},
        )
    return value


def check_namespace(value: str) -> str:
    """`value`, if it is a valid namespace. Raises InvalidArgument."""
    return check_id(value, "namespace")
