"""What the kernel does at once is done right on the event loop: hops to a thread and back are a tenth of what it takes
to make and remove a cgroup, and more on a busy machine.

Its locks are the whole host's, though: where many processes join cgroups, who makes one waits. So a call that waited
sends those that follow to threads, for a while.
"""

import resource
import time
from collections.abc import Callable

LONG_S = 0.005
"""Of the loop's time."""
REST_S = 1.0


class WouldWaitError(Exception):
    """This takes processes that end, or somebody who has a lock."""


def _waits() -> int:
    """How often this thread has waited for anything; who is merely not given a CPU does not. Source: getrusage(2)."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class Prompt:
    """Whether, and what, to do on the loop."""

    def __init__(self, now: Callable[[], float] = time.monotonic, waits: Callable[[], int] = _waits) -> None:
        self._now = now
        self._waits = waits
        self._rests_until = 0.0

    def is_given(self) -> bool:
        """Whether the kernel has been prompt of late."""
        return self._now() >= self._rests_until

    def run[T](self, fn: Callable[[], T]) -> T:
        """Do it here. Raises what it raises, WouldWaitError above all."""
        began, waits = self._now(), self._waits()
        try:
            return fn()
        finally:
            ended = self._now()
            if ended - began > LONG_S and self._waits() > waits:
                self._rests_until = ended + REST_S
