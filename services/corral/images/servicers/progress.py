"""Progress on its way to a client."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from corral.api.types.v1 import types_pb2 as types
from corral.images.progress import Step

PROGRESS_EVERY_S = 0.1


class ProgressQueue:
    """Reports on their way to a client, the latest of each item and step, a few times a second."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, Step], types.Progress] = {}
        self._changed = asyncio.Event()

    def report(self, item: str, step: Step, done_bytes: int, total_bytes: int) -> None:
        """On the event loop."""
        message = types.Progress(
            item=item, step=types.Progress.Step.ValueType(step), done_bytes=done_bytes, total_bytes=total_bytes
        )
        self._waiting[item, step] = message
        self._changed.set()

    async def of(self, work: asyncio.Future[Any]) -> AsyncGenerator[types.Progress]:
        """What is reported until `work` ends, and then how it ended, if it failed. Whoever leaves early ends it."""
        try:
            async for message in self._until_done(work):
                yield message
            await work
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))

    async def _until_done(self, work: asyncio.Future[Any]) -> AsyncIterator[types.Progress]:
        while not work.done():
            waiting = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            self._changed.clear()
            for message in self._take():
                yield message
            if not work.done():
                await asyncio.wait((work,), timeout=PROGRESS_EVERY_S)
        for message in self._take():
            yield message

    def _take(self) -> list[types.Progress]:
        taken = list(self._waiting.values())
        self._waiting.clear()
        return taken
