"""An event loop of two kinds of events: a socket can be read or written, a time has come."""

import heapq
import itertools
import selectors
import socket
import time
from collections.abc import Callable

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Loop:
    """See the module."""

    def __init__(self) -> None:
        self._selector = selectors.EpollSelector()
        self._watched: dict[int, int] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def watch(self, one: socket.socket, events: int, call: Callable[[int], None]) -> None:
        """Call with what can be done, of READ and WRITE, from now on; 0: no more, also before it is closed."""
        fd = one.fileno()
        before = self._watched.get(fd, 0)
        if events == before:
            return
        if not events:
            self._selector.unregister(fd)
            del self._watched[fd]
            return
        if before:
            self._selector.modify(fd, events, call)
        else:
            self._selector.register(fd, events, call)
        self._watched[fd] = events

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._order), call))

    def run_once(self) -> None:
        """Wait for what happens next, and call whom it concerns."""
        timeout_s = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
        for key, events in self._selector.select(timeout_s):
            # Who was called before may have closed it, and another may have its number by now.
            if self._selector.get_map().get(key.fd) is key:
                key.data(events)
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()
