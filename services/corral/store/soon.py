"""Small writes that wait for a transaction to share.

A transaction of one row costs many times what the row does. What a kill may take without harm, because whoever starts
next finds it out anyway, is therefore written with whatever is written next, before it and in order, or by itself a
moment later.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from corral.store.pending import Pending

if TYPE_CHECKING:
    from corral.store.database import Transaction

type Writing = Callable[["Transaction"], object]

SOON_S = 0.02
# On a disk that is full.
RETRY_S = 1.0


class Soon:
    """Of one database. `write` is called on the loop when some have waited long enough."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self.waiting: deque[Writing] = deque()
        """In order; those that are in a transaction until written() is called."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_armed = False

    def add(self, writing: Writing) -> None:
        """One more; on the event loop."""
        self.waiting.append(writing)
        self.arm(SOON_S)

    def arm(self, delay_s: float) -> None:
        """Have `write` called by then; on the event loop."""
        if not self._is_armed:
            self._is_armed = True
            self._loop = asyncio.get_running_loop()
            self._loop.call_later(delay_s, self._is_now)

    def _is_now(self) -> None:
        self._is_armed = False
        if self.waiting:
            self._write()

    def written(self, number: int) -> None:
        """The first ones are in a transaction that was committed."""
        for _ in range(number):
            self.waiting.popleft()

    def write_each(self, transact: Callable[[Writing], object]) -> None:
        """In transactions of their own, as far as the disk has room; the others wait on. On the event loop."""
        while self.waiting:
            writing = self.waiting.popleft()
            try:
                transact(writing)
            except OSError:
                self.waiting.appendleft(writing)
                self.arm(RETRY_S)
                return
            except Exception as e:  # noqa: BLE001  # a mistake in our SQL, and no business of whoever writes next
                _report(asyncio.get_running_loop(), e)

    def hand_over(self, put: Callable[[Pending], None]) -> None:
        """To the writer thread: what is handed to it next must not overtake them. From any thread."""
        while self.waiting:
            writing = self.waiting.popleft()
            pending, future = Pending.for_thread(writing)
            future.add_done_callback(lambda future, writing=writing: self._look_at(future, writing))  # type: ignore[misc]
            put(pending)

    def _look_at(self, future: Future[object], writing: Writing) -> None:
        error, loop = future.exception(), self._loop
        if error is not None and loop is not None:
            again = partial(self.add, writing) if isinstance(error, OSError) else partial(_report, loop, error)
            with suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(again)


def _report(loop: asyncio.AbstractEventLoop, error: BaseException) -> None:
    loop.call_exception_handler({"message": "what was to be written soon failed", "exception": error})
