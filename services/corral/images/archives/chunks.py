"""Bytes that arrive on the event loop, read by a thread."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator

DEPTH = 8
PIECE_BYTES = 256 << 10  # what a client sends at once may be of any size, what waits here is not


class Cancelled(Exception):
    """The sender gave up."""


class ChunkPipe:
    """Bounded: a sender that is faster than the disk is held back."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(DEPTH)
        self._closed = False

    async def feed(self, source: AsyncIterator[bytes]) -> None:
        """Pass on all of `source`. Whatever ends it early, also a cancellation, reaches the reader as Cancelled."""
        end: BaseException | None = Cancelled("the transfer was broken off")
        try:
            async for chunk in source:
                for start in range(0, len(chunk), PIECE_BYTES):
                    await self._room.acquire()
                    if self._closed:
                        return
                    self._chunks.put(chunk[start : start + PIECE_BYTES])
            end = None
        finally:
            self._chunks.put(end)

    def abort(self) -> None:
        """End a reader that still waits."""
        self._chunks.put(Cancelled("the transfer was broken off"))

    def read(self) -> Iterator[bytes]:
        """For one other thread. Raises Cancelled."""
        while (item := self._chunks.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            self._make_room()
            yield item

    def close_reader(self) -> None:
        """The reader wants no more; the sender may stop."""
        self._closed = True
        self._make_room()

    def _make_room(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._room.release)
        except RuntimeError as e:
            raise Cancelled("the daemon is stopping") from e
