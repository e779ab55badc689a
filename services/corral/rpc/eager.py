"""Calls of other processes begin at once: gRPC's tasks, each of which would wait for the loop to come round.

For every call grpc.aio makes three tasks one after the other: for the call itself, for its failure, and to ask for the
next call. Begun in the same iteration, a small call takes a sixth less (300 us instead of 350, 2 cores).
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

_GRPCS = frozenset(("_schedule_rpc_coro", "_handle_exceptions", "AioServer._request_call"))
"""By qualified name; those of another version of gRPC begin as ever."""


def begin_calls_at_once(loop: asyncio.AbstractEventLoop) -> None:
    """For servers that are started on this loop from now on; nothing, where somebody else makes its tasks."""
    if loop.get_task_factory() is None:
        loop.set_task_factory(_task)


def _task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
    if getattr(coro, "__qualname__", "") in _GRPCS:
        options["eager_start"] = True
    return asyncio.Task(coro, loop=loop, **options)
