"""Events that somebody can wait for the first of, without a task for each."""

import asyncio
from collections.abc import Callable


class Happening(asyncio.Event):
    """An event that also calls who watches it, when it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers: set[Callable[[], None]] = set()

    def set(self) -> None:
        super().set()
        for wake in tuple(self._watchers):
            wake()

    def watch(self, wake: Callable[[], None]) -> None:
        self._watchers.add(wake)

    def leave(self, wake: Callable[[], None]) -> None:
        self._watchers.discard(wake)


async def first_of(*happenings: Happening) -> None:
    """Wait until one of them is set."""
    first = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not first.done():
            first.set_result(None)

    try:
        for happening in happenings:
            if happening.is_set():
                return
            happening.watch(wake)
        await first
    finally:
        for happening in happenings:
            happening.leave(wake)
