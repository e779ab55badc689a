"""Blocking calls, off the event loop.

For calls that end by themselves soon (SQLite, netlink, mount, fsync). What waits for somebody else (a process, a
client) belongs on the loop, and heavy computing in a worker process: here it would take a thread from everybody. What
takes a disk as long as it has data, or waits for a worker process, has threads of its own: run_long(). So has what
systemd is asked, which may not answer: run_asking().
A hop costs 70 us on an idle 2-core machine; put all blocking work of one RPC into one function.
"""

import asyncio
import contextvars
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from corral.rpc.threads import Threads

MAX_THREADS = 16
MAX_LONG_THREADS = 8
MAX_ASKING_THREADS = 4

_threads = Threads(MAX_THREADS, "blocking")
_long_threads = Threads(MAX_LONG_THREADS, "long")
_asking_threads = Threads(MAX_ASKING_THREADS, "asking")


async def run_blocking[**P, T](fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `fn` in a bounded pool of threads, with the caller's context variables.

    A cancelled caller stops waiting; `fn` itself, once it has begun, still runs to its end.
    """
    return await _run_in(_threads, partial(fn, *args, **kwargs))


async def run_long[**P, T](fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As run_blocking(), for what copies trees or makes file systems: others who do wait for it, and nobody else."""
    return await _run_in(_long_threads, partial(fn, *args, **kwargs))


async def run_asking[**P, T](fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As run_blocking(), for what asks another program of the host: a hung one holds up only those who ask it, too."""
    return await _run_in(_asking_threads, partial(fn, *args, **kwargs))


async def _run_in[T](threads: Threads, fn: Callable[[], T]) -> T:
    # loop.run_in_executor() does the same with two futures more.
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    threads.submit(partial(_run, partial(contextvars.copy_context().run, fn), future, loop))
    return await future


def _run[T](work: Callable[[], T], future: asyncio.Future[T], loop: asyncio.AbstractEventLoop) -> Callable[[], object]:
    if future.cancelled():  # before its turn
        return _nothing
    try:
        result = work()
    except BaseException as e:  # noqa: BLE001  # the caller must hear of it
        return partial(_tell, loop, partial(_set_exception, future, e))
    return partial(_tell, loop, partial(_set_result, future, result))


def _nothing() -> None:
    """Nobody waits."""


def _tell(loop: asyncio.AbstractEventLoop, outcome: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # it is closed: nobody waits any more
        loop.call_soon_threadsafe(outcome)


def _set_result[T](future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception[T](future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
