"""When a process begins to execute itself anew, and when it does not: a real check, no host."""

import asyncio
import signal

from corral.daemon.upgrade import Upgrading, check, command

ARGV = ("--version",)  # what is checked need not do more than load


def upgrading(stop: asyncio.Event) -> Upgrading:
    return Upgrading(ARGV, stop, 0, grace_s=1)


async def test_one_that_is_told_to_end_while_it_is_checked_is_not_upgraded() -> None:
    stop = asyncio.Event()
    one = upgrading(stop)
    one.set_ready()
    asked = one.ask()
    await asyncio.sleep(0.05)
    assert not asked.done()
    one.on_end(signal.SIGTERM)
    await asked
    assert (stop.is_set(), one.plan.wanted) == (True, False)


async def test_the_first_signal_to_end_after_an_upgrade_has_begun_asks_for_a_clean_stop() -> None:
    stop = asyncio.Event()
    one = upgrading(stop)
    one.set_ready()
    await one.ask()
    assert (stop.is_set(), one.plan.wanted) == (True, True)
    one.on_end(signal.SIGTERM)
    assert (stop.is_set(), one.plan.wanted) == (True, False)


async def test_one_that_still_starts_is_upgraded_when_it_is_there() -> None:
    stop = asyncio.Event()
    one = upgrading(stop)
    asked = one.ask()
    for _ in range(2):
        await check(command(ARGV))
    assert not asked.done()
    assert not stop.is_set()
    one.set_ready()
    await asked
    assert one.plan.wanted
