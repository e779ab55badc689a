"""Blocking calls, off the event loop.

For calls that end by themselves soon (SQLite, netlink, mount, fsync). What waits for somebody else (a process, a
client) belongs on the loop, and heavy computing in a worker process: here it would take a thread from everybody.
A hop costs 70 us on an idle 2-core machine; put all blocking work of one RPC into one function.
"""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

MAX_THREADS = 16

_threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="blocking")


async def run_blocking[**P, T](fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `fn` in a bounded pool of threads, with the caller's context variables.

    A cancelled caller stops waiting; `fn` itself still runs to its end.
    """
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_threads, lambda: context.run(fn, *args, **kwargs))
