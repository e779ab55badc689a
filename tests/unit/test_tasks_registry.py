"""What happens in the background ends before what it uses is closed."""

import asyncio

from corral.tasks.registry import Registry


async def test_a_stop_waits_for_what_it_cuts_short_and_for_what_that_begins():
    registry, ended = Registry(), list[str]()

    async def clean_up(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            if name:
                registry.until_stopped(clean_up(""))
            ended.append(name)

    registry.until_stopped(clean_up("first"))
    await asyncio.sleep(0)
    await registry.stop()
    assert ended == ["first"]
    assert len(asyncio.all_tasks()) == 1
