"""What the kernel does at once is done right on the event loop: to make and remove a cgroup takes a tenth longer by way
of a thread.

Its locks are the whole host's, though: where many processes join cgroups, who makes one waits. So a call that took long
sends those that follow to threads, for a while.
"""

import time
from collections.abc import Callable

LONG_S = 0.005
"""Of the loop's time."""
REST_S = 1.0


class WouldWaitError(Exception):
    """This takes processes that end, or somebody who has a lock."""


class Prompt:
    """Whether, and what, to do on the loop."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._rests_until = 0.0

    def is_given(self) -> bool:
        """Whether the kernel has been prompt of late."""
        return self._now() >= self._rests_until

    def run[T](self, fn: Callable[[], T]) -> T:
        """Do it here. Raises what it raises, WouldWaitError above all."""
        began = self._now()
        try:
            return fn()
        finally:
            ended = self._now()
            if ended - began > LONG_S:
                self._rests_until = ended + REST_S
