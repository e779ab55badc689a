"""Requests are read to their end, wanted or not, and nobody hangs on them."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from corral.images.servicers import inflow
from corral.images.servicers.inflow import Inflow


class Client:
    """Sends numbers, and remembers how many were taken."""

    def __init__(self, count: int, *, then: BaseException | None = None, stays: bool = False) -> None:
        self.sent = 0
        self._count = count
        self._then = then
        self._stays = stays

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(self._count):
            await asyncio.sleep(0)
            self.sent += 1
            yield number
        if self._then is not None:
            raise self._then
        if self._stays:
            await asyncio.Event().wait()


async def test_requests_come_in_order_and_end() -> None:
    async with Inflow(aiter(Client(100))) as requests:
        assert [number async for number in requests] == list(range(100))
        assert await anext(requests, None) is None


async def test_a_client_that_breaks_off_is_seen() -> None:
    async with Inflow(aiter(Client(2, then=ConnectionError("gone")))) as requests:
        with pytest.raises(ConnectionError):
            _ = [number async for number in requests]


async def refused(client: Client) -> None:
    """Take one request, and fail."""

    async def call() -> None:
        async with Inflow(aiter(client)) as requests:
            await anext(requests)
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        await call()


async def test_an_error_waits_until_the_client_has_sent_all() -> None:
    client = Client(500)
    await refused(client)
    assert client.sent == 500


async def test_an_error_does_not_wait_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflow, "DRAIN_S", 0.1)
    async with asyncio.timeout(2):
        await refused(Client(50, stays=True))


async def test_leaving_early_without_an_error_does_not_wait() -> None:
    client = Client(10_000, stays=True)
    async with asyncio.timeout(2), Inflow(aiter(client)) as requests:
        await anext(requests)
        await asyncio.sleep(0.01)
    assert client.sent < 20


async def test_a_cancelled_call_does_not_wait() -> None:
    async def call() -> None:
        async with Inflow(aiter(Client(10_000, stays=True))) as requests:
            await anext(requests)
            await asyncio.sleep(10)

    task = asyncio.ensure_future(call())
    await asyncio.sleep(0.01)
    task.cancel()
    async with asyncio.timeout(2):
        with pytest.raises(asyncio.CancelledError):
            await task
