"""Calls that change something run to their end, also if who asked for it gives up: a half is never left.

What is under way when the service stops is waited for.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from corral.rpc.lasting import lasting


class Work:
    """What is under way. For the event loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def to_the_end[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, which begins at once. A caller that is cancelled stops waiting, and no more."""
        return await lasting(work, self._begin)

    def _begin[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)
        if not task.done():
            self._running.add(task)
            task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, whether or not the caller is still there

    async def close(self) -> None:
        """Wait for what is under way."""
        while self._running:
            await asyncio.wait(tuple(self._running))
