"""Changes that are made one at a time, and to their end, whoever goes away meanwhile."""

import asyncio
from collections.abc import Coroutine
from typing import Any
from weakref import WeakValueDictionary


class Alone:
    """On one event loop, by what is changed."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._changes: set[asyncio.Task[Any]] = set()

    async def run[T](self, name: str, change: Coroutine[Any, Any, T]) -> T:
        """Make a change when those of the same name are over. Who is cancelled does not wait for it."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        task = asyncio.Task(self._locked(name, change, over), loop=loop, eager_start=True)
        if not task.done():
            self._changes.add(task)
            task.add_done_callback(self._ended)
            await over
        return task.result()

    def has_others(self) -> bool:
        """Whether a change, asked within one that has not waited for anything yet, is not the only one."""
        return bool(self._changes)

    async def finish(self) -> None:
        """Wait for those that were begun."""
        if self._changes:
            await asyncio.wait(self._changes)

    async def _locked[T](self, name: str, change: Coroutine[Any, Any, T], over: asyncio.Future[None]) -> T:
        lock = self._locks.setdefault(name, asyncio.Lock())
        try:
            async with lock:
                return await change
        finally:
            if not over.done():  # by the caller's going away; the loop tells of this sooner than of the task's end
                over.set_result(None)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # seen, whether or not the caller is still there
