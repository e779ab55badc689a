"""Waiting for the first of several events."""

import asyncio

from corral.tasks.happening import Happening, first_of


async def test_the_first_one_wakes_who_waits_and_nobody_is_left_watching():
    one, other = Happening(), Happening()
    waiting = asyncio.ensure_future(first_of(one, other))
    await asyncio.sleep(0)
    assert not waiting.done()
    other.set()
    one.set()
    await asyncio.wait_for(waiting, 1)
    assert not one._watchers
    assert not other._watchers


async def test_one_that_has_happened_is_not_waited_for():
    one, other = Happening(), Happening()
    other.set()
    await asyncio.wait_for(first_of(one, other), 1)
    assert not one._watchers


async def test_who_is_cancelled_leaves_no_trace():
    one = Happening()
    waiting = asyncio.ensure_future(first_of(one))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert not one._watchers
    one.set()
    assert await one.wait()
