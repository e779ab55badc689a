"""What a client streams to us, read to its end also when we know before that we do not want it.

A call that ends with an error while its client is still sending shows grpc.aio's clients "Internal error from Core"
instead of the error, one time in four: there the failed write wins over the status that came with it. So the status is
sent when the client is done, or after a few seconds of discarding what it sends.
"""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

DRAIN_S = 5.0
DEPTH = 4


class Inflow[T]:
    """Iterate for the requests, within `async with`. At the end of the block, if it raises, the rest is discarded."""

    def __init__(self, requests: AsyncIterator[T]) -> None:
        self._requests = requests
        self._waiting: asyncio.Queue[T | None] = asyncio.Queue(DEPTH)
        self._discarding = False

    async def __aenter__(self) -> Self:
        # One task from the first request to the last: a read that is cancelled half-way spoils the stream.
        self._reading = asyncio.ensure_future(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if isinstance(e, Exception):
                await self._drain()
        finally:
            self._discarding = True  # a reader that is cancelled must not wait for room
            self._reading.cancel()
            await asyncio.wait((self._reading,))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        request = await self._waiting.get()
        if request is None:
            self._waiting.put_nowait(None)
            await self._reading  # it broke off, if so
            raise StopAsyncIteration
        return request

    async def _read(self) -> None:
        try:
            async for request in self._requests:
                if not self._discarding:
                    await self._waiting.put(request)
        finally:
            if not self._discarding:
                await self._waiting.put(None)

    async def _drain(self) -> None:
        self._discarding = True
        while not self._waiting.empty():
            self._waiting.get_nowait()
        await asyncio.wait((self._reading,), timeout=DRAIN_S)
