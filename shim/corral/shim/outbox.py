"""Messages for one receiver: they wait, are sent, or, if there are too many of them, are dropped.

    put --> waiting, at most `limit` bytes of memory --> receiver.send     never blocks; the oldest are dropped, counted

A receiver that went away is asked for again every RETRY_S, if it is one that may come back.
"""

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from corral.shim.loop import ERROR_ONLY, IN, OUT, Loop, Timer
from corral.shim.spool import StreamName

RETRY_S = 1.0
PAUSE_S = 0.05
_OVERHEAD = 128
"""Bytes of memory that a message takes beside its own."""


class Refused(Exception):
    """The receiver will never take this message."""


class Receiver(Protocol):
    """Who gets messages. Nothing of it blocks."""

    returns: bool
    """Whether connect() may bring it back after it was lost."""
    hears: bool
    """Whether it may end the connection by itself, which is to be looked for."""

    def connect(self) -> None:
        """Connect, or begin to. Raises OSError."""

    def fileno(self) -> int:
        """What is written to, -1 while there is no connection."""

    def send(self, message: bytes) -> int:
        """How many bytes of it were taken. Raises Refused, OSError if the receiver is gone, BlockingIOError.

        With ENOBUFS in that the kernel lacks memory, and does not tell when there is some again.
        """

    def close(self) -> None:
        """Hang up; harmless when repeated."""


@dataclass(slots=True)
class _Waiting:
    """`size`: how many of the container's bytes it stands for; `sent`: how much of it is on its way already.

    `behind`: how many of the same stream were dropped right behind it while it was half sent.
    """

    stream: StreamName
    size: int
    message: bytes
    sent: int = 0
    behind: int = 0

    @property
    def cost(self) -> int:
        """Bytes of memory, about."""
        return len(self.message) + _OVERHEAD


class Outbox:
    """Messages for one receiver, in order. Owns it."""

    __slots__ = (
        "_bytes",
        "_is_new",
        "_limit",
        "_loop",
        "_on_done",
        "_pause",
        "_progress_at",
        "_receiver",
        "_retry",
        "_waiting",
        "_watched",
        "dropped_bytes",
    )

    def __init__(
        self, loop: Loop, receiver: Receiver, *, limit: int, on_done: Callable[[StreamName, int], None]
    ) -> None:
        """limit: bytes of memory. on_done: so many more of the container's bytes of a stream wait no longer, in order.

        Those that were dropped are counted in dropped_bytes.
        """
        self.dropped_bytes = 0
        self._loop, self._receiver, self._limit, self._on_done = loop, receiver, limit, on_done
        self._waiting: deque[_Waiting] = deque()
        self._bytes, self._watched = 0, -1
        self._is_new = True  # nothing was sent over this connection yet
        self._retry: Timer | None = None
        self._pause: Timer | None = None
        self._progress_at = time.monotonic()
        self._watch()
        if receiver.fileno() < 0 and receiver.returns:
            self._retry = loop.call_later(RETRY_S, self._try_again)

    def put(self, stream: StreamName, size: int, message: bytes) -> None:
        """Send it, or keep it for later, or drop what is oldest."""
        self._waiting.append(_Waiting(stream, size, message))
        self._bytes += self._waiting[-1].cost
        if len(self._waiting) == 1:
            self._progress_at = time.monotonic()  # there was none to make
            self._send()
        while self._bytes > self._limit and len(self._waiting) > 1:
            self._drop_oldest()

    def delivered(self, stuck_s: float) -> bool:
        """Whether nothing waits, or nothing was taken for that many seconds, or never will be."""
        return not self._waiting or time.monotonic() - self._progress_at > stuck_s

    def reconnect(self) -> None:
        """Hang up and connect again."""
        if self._retry is not None:
            self._retry.cancel()
        self._try_again()

    def close(self) -> None:
        """Drop what waits and hang up."""
        while self._waiting:
            self._done(sent=False)
        for timer in (self._retry, self._pause):
            if timer is not None:
                timer.cancel()
        self._forget()
        self._receiver.close()

    def _send(self) -> None:
        failures = 0
        while self._waiting and self._receiver.fileno() >= 0:
            first = self._waiting[0]
            try:
                first.sent += self._receiver.send(first.message[first.sent :] if first.sent else first.message)
            except BlockingIOError as e:
                if e.errno == errno.ENOBUFS and self._pause is None:
                    self._pause = self._loop.call_later(PAUSE_S, self._go_on)
                break
            except Refused:
                self._done(sent=False)
                continue
            except OSError:
                # A datagram's error may be about the one before: once more at once, then later.
                failures += 1
                self._lost(again=failures == 1)
                continue
            failures, self._progress_at, self._is_new = 0, time.monotonic(), False
            if first.sent >= len(first.message):
                self._done(sent=True)
        if self._receiver.fileno() < 0 and not self._receiver.returns:
            while self._waiting:
                self._done(sent=False)
        self._watch()

    def _go_on(self) -> None:
        self._pause = None
        self._send()

    def _lost(self, *, again: bool) -> None:
        self._forget()
        self._receiver.close()
        if self._waiting:
            self._waiting[0].sent = 0
        if again and self._receiver.returns:
            self._is_new = True
            with contextlib.suppress(OSError):
                self._receiver.connect()
        if self._receiver.fileno() < 0 and self._receiver.returns and self._retry is None:
            self._retry = self._loop.call_later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._lost(again=True)
        self._send()

    def _drop_oldest(self) -> None:
        """Of a message that is half sent the rest must follow; the one after it goes then."""
        first = self._waiting[0]
        if not first.sent:
            self._done(sent=False)
            return
        dropped = self._waiting[1]
        del self._waiting[1]
        self._bytes -= dropped.cost
        self.dropped_bytes += dropped.size
        if dropped.stream == first.stream:
            first.behind += dropped.size
        else:
            self._on_done(dropped.stream, dropped.size)

    def _done(self, *, sent: bool) -> None:
        done = self._waiting.popleft()
        self._bytes -= done.cost
        if not sent:
            self.dropped_bytes += done.size
        self._on_done(done.stream, done.size + done.behind)

    def _watch(self) -> None:
        fd = self._receiver.fileno()
        if fd != self._watched:
            self._forget()
        if fd >= 0:
            events = (IN if self._receiver.hears else ERROR_ONLY) | (
                OUT if self._waiting and self._pause is None else 0
            )
            self._watched = fd
            self._loop.watch(fd, events, self._on_ready)

    def _forget(self) -> None:
        if self._watched >= 0:
            self._loop.forget(self._watched)
            self._watched = -1

    def _on_ready(self, events: int) -> None:
        if events & ~OUT and (not self._receiver.hears or not self._hears_nothing()):
            self._lost(again=not self._is_new)  # else whoever refuses would be asked again without a pause
        self._send()

    def _hears_nothing(self) -> bool:
        """Whether the connection stands; what a receiver says is of no interest."""
        try:
            return bool(os.read(self._receiver.fileno(), 4096))
        except BlockingIOError:
            return True
        except OSError:
            return False
