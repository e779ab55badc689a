"""Threads for what blocks."""

import asyncio
import threading

from corral.rpc.blocking import MAX_LONG_THREADS, MAX_THREADS, run_blocking, run_long


async def test_what_takes_long_keeps_nobody_else_waiting() -> None:
    """As many as there are threads of either kind, and more: a quick call comes through all the same."""
    go = threading.Event()
    copies = [asyncio.ensure_future(run_long(go.wait, 30)) for _ in range(MAX_LONG_THREADS + MAX_THREADS)]
    await asyncio.sleep(0)
    try:
        assert await asyncio.wait_for(run_blocking(lambda: 7), 10) == 7
        assert not any(copy.done() for copy in copies)
    finally:
        go.set()
    assert all(await asyncio.gather(*copies))
