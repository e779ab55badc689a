"""Work that goes on when whoever waits for it gives up: half of a change must never be left."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


async def lasting[T](work: Coroutine[Any, Any, T], begin: Callable[[Coroutine[Any, Any, T]], asyncio.Task[T]]) -> T:
    """Await `work` in a task that `begin` makes, eagerly. A caller that is cancelled leaves at once; the task goes on.

    As asyncio.shield(), but the work itself says that it ends: a round of the loop sooner than its task would.
    """
    over = asyncio.get_running_loop().create_future()
    task = begin(_telling(work, over))
    if not task.done():
        await over
    return task.result()


async def _telling[T](work: Coroutine[Any, Any, T], over: asyncio.Future[None]) -> T:
    try:
        return await work
    finally:
        if not over.done():  # by the caller's going away
            over.set_result(None)
