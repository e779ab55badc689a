"""Work that outlasts whoever waits for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from corral.rpc.lasting import lasting


def begin[T](work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)


async def test_who_waits_gets_what_comes_of_it() -> None:
    async def work(*, fails: bool, waits: bool) -> int:
        if waits:
            await asyncio.sleep(0)
        if fails:
            raise KeyError("no")
        return 1

    for waits in (True, False):
        assert await lasting(work(fails=False, waits=waits), begin) == 1
        with pytest.raises(KeyError):
            await lasting(work(fails=True, waits=waits), begin)


async def test_who_is_cancelled_leaves_at_once_and_the_work_goes_on() -> None:
    may_end, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await may_end.wait()
        ended.set()

    waiting = asyncio.create_task(lasting(work(), begin))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not ended.is_set()
    may_end.set()
    await asyncio.wait_for(ended.wait(), 30)


async def test_work_that_is_cancelled_tells_who_waits() -> None:
    begun: list[asyncio.Task[None]] = []

    def kept(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        begun.append(begin(work))
        return begun[0]

    async def work() -> None:
        await asyncio.get_running_loop().create_future()

    waiting = asyncio.create_task(lasting(work(), kept))
    await asyncio.sleep(0)
    begun[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_its_end_is_known_in_the_next_round_of_the_loop() -> None:
    may_end = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(lasting(asyncio.wait_for(may_end, None), begin))
    await asyncio.sleep(0)
    may_end.set_result(None)
    await asyncio.sleep(0)  # it ends
    await asyncio.sleep(0)
    assert waiting.done()
