"""One epoll, a heap of timers: the only thing in a shim that waits."""

import heapq
import select
import time
from collections.abc import Callable

IN, OUT = select.EPOLLIN, select.EPOLLOUT
ERROR_ONLY = 0
"""The kernel reports EPOLLERR and EPOLLHUP unasked: who waits for nothing still learns that the peer is gone."""
LONGEST_WAIT_S = 86_400.0
"""epoll_wait(2) counts milliseconds in an int, which end after 24 days."""


class Timer:
    """A call that will be made later, unless cancelled."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not call; harmless when called already."""
        self.callback = None


class Loop:
    """Calls a handler when its file descriptor is ready.

    epoll is level-triggered and asked for one event at a time: so no event can be stale, whatever a handler closed.
    """

    __slots__ = ("_epoll", "_handlers", "_running", "_sequence", "_timers", "on_error")

    def __init__(self, *, on_error: Callable[[Exception], None] | None = None) -> None:
        """on_error gets what a handler or timer raises; without it run() raises that.

        The failed handler's descriptor is watched no more, so that it can't fail for ever.
        """
        self.on_error = on_error
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = 0
        self._running = False

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call handler(events) whenever fd is ready; a second call for the fd replaces events and handler."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Stop watching; call it before the fd is closed. Harmless when not watched."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call callback once, that many seconds from now."""
        timer = Timer(callback)
        self._sequence += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._sequence, timer))
        return timer

    def run(self) -> None:
        """Serve until stop() is called."""
        self._running = True
        while self._running:
            self.step(self._timeout())

    def step(self, timeout_s: float) -> bool:
        """Wait for one event, at most that long (-1: for ever), and handle it; whether there was one."""
        ready = self._epoll.poll(timeout_s, 1)
        for fd, events in ready:
            handler = self._handlers.get(fd)
            if handler is not None:
                try:
                    handler(events)
                except Exception as e:  # noqa: BLE001 - passed on
                    self._failed(e)
                    self.forget(fd)
        self._run_timers()
        return bool(ready)

    def _failed(self, error: Exception) -> None:
        if self.on_error is None:
            raise error
        self.on_error(error)

    def stop(self) -> None:
        """Let run() return after the current handler."""
        self._running = False

    def close(self) -> None:
        """Release the epoll descriptor."""
        self._epoll.close()

    def _timeout(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return min(max(0.0, self._timers[0][0] - time.monotonic()), LONGEST_WAIT_S) if self._timers else -1

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                try:
                    callback()
                except Exception as e:  # noqa: BLE001 - passed on
                    self._failed(e)
