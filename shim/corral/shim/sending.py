"""Output on its way to somebody else: messages that wait, are sent, or, if there are too many of them, are dropped.

    log.write --> waiting, at most `limit` bytes --> receiver.send     never blocks; the oldest are dropped, counted
                                                 '-> the spool's mark  what was sent or dropped, and only that

A receiver that went away is asked for again every RETRY_S, if it is one that may come back. What waits lies in the
spool too, so the shim after one that was killed sends it; what that had sent without saying so is sent twice.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from corral.kernel.failpoint import failpoint
from corral.shim.logs import Log, Part, cut
from corral.shim.loop import ERROR_ONLY, IN, OUT, Loop, Timer
from corral.shim.spool import STREAMS, Position, Spool, StreamName

RETRY_S = 1.0
DEFAULT_LIMIT = 1 << 20
_NOWHERE: Position = (0, 0)
"""There is no file, and no telling how far a receiver had come but by the mark."""


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
        """How many bytes of it were taken. Raises BlockingIOError, Refused, OSError if the receiver is gone."""

    def close(self) -> None:
        """Hang up; harmless when repeated."""


@dataclass(slots=True)
class _Waiting:
    """`size`: how many of the container's bytes it stands for; `sent`: how much of it is on its way already."""

    stream: StreamName
    size: int
    message: bytes
    sent: int = 0


class Queue:
    """Messages for one receiver, in order. Owns it."""

    __slots__ = (
        "_bytes",
        "_is_new",
        "_limit",
        "_loop",
        "_on_done",
        "_progress_at",
        "_receiver",
        "_retry",
        "_waiting",
        "_watched",
    )

    def __init__(
        self, loop: Loop, receiver: Receiver, *, limit: int, on_done: Callable[[StreamName, int, bool], None]
    ) -> None:
        """on_done: so many of the container's bytes of a stream were sent or, if False, dropped."""
        self._loop, self._receiver, self._limit, self._on_done = loop, receiver, limit, on_done
        self._waiting: deque[_Waiting] = deque()
        self._bytes, self._watched = 0, -1
        self._is_new = True  # nothing was sent over this connection yet
        self._retry: Timer | None = None
        self._progress_at = time.monotonic()
        self._watch()
        if receiver.fileno() < 0 and receiver.returns:
            self._retry = loop.call_later(RETRY_S, self._try_again)

    def put(self, stream: StreamName, size: int, message: bytes) -> None:
        """Send it, or keep it for later, or drop what is oldest."""
        self._waiting.append(_Waiting(stream, size, message))
        self._bytes += len(message)
        if len(self._waiting) == 1:
            self._send()
        while self._bytes > self._limit and len(self._waiting) > 1:
            self._drop_oldest()

    def delivered(self, stuck_s: float) -> bool:
        """Whether nothing waits, or nothing was taken for that many seconds, or never will be."""
        return not self._waiting or time.monotonic() - self._progress_at > stuck_s

    def reconnect(self) -> None:
        """Hang up and connect again."""
        self._lost(again=True)

    def close(self) -> None:
        """Drop what waits and hang up."""
        while self._waiting:
            self._done(sent=False)
        if self._retry is not None:
            self._retry.cancel()
        self._forget()
        self._receiver.close()

    def _send(self) -> None:
        failures = 0
        while self._waiting and self._receiver.fileno() >= 0:
            first = self._waiting[0]
            try:
                first.sent += self._receiver.send(first.message[first.sent :] if first.sent else first.message)
            except BlockingIOError:
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
        self._bytes -= len(dropped.message)
        self._on_done(dropped.stream, dropped.size, False)

    def _done(self, *, sent: bool) -> None:
        done = self._waiting.popleft()
        self._bytes -= len(done.message)
        self._on_done(done.stream, done.size, sent)

    def _watch(self) -> None:
        fd = self._receiver.fileno()
        if fd != self._watched:
            self._forget()
        if fd >= 0:
            events = (IN if self._receiver.hears else ERROR_ONLY) | (OUT if self._waiting else 0)
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


class Framing(Protocol):
    """Turns lines into messages."""

    def message(self, stream: StreamName, text: bytes, time_ns: int, piece: "Piece | None") -> bytes:
        """Of a line without its newline, or of a piece of one."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Which part of a line that is longer than one message; they count from 1."""

    line: str
    number: int
    last: bool


class SendingLog:
    """Sends each line as a message. With a cache, a log in a file, it can be read all the same."""

    __slots__ = ("_cache", "_framing", "_lines", "_marked", "_queue", "_spool", "_waiting", "dropped_bytes")

    def __init__(
        self,
        loop: Loop,
        receiver: Receiver,
        framing: Framing,
        *,
        limit: int = DEFAULT_LIMIT,
        cache: Log | None = None,
        spool: Spool | None = None,
    ) -> None:
        """receiver: connected; owned from here on, as are the cache and the spool."""
        self._framing, self._cache, self._spool = framing, cache, spool
        self._waiting: dict[StreamName, bytes] = {}
        self._lines: dict[StreamName, Piece] = {}
        self.dropped_bytes = 0
        self._queue = Queue(loop, receiver, limit=limit, on_done=self._done)
        for stream, data in unsent(spool).items():
            self.write(stream, data)

    def take(self, stream: StreamName, fd: int, size: int, *, pipe: bool) -> bytes:
        """Read what is to be sent next; should this process be killed before it is, it is not lost."""
        return os.read(fd, size) if self._spool is None else self._spool.take(stream, fd, size, pipe=pipe)

    def write(self, stream: StreamName, data: bytes) -> None:
        """Send the lines that are complete now, with the present time."""
        if self._cache is not None:
            self._cache.write(stream, data)
        now = time.time_ns()
        for part, group in cut(self._waiting.pop(stream, b"") + data):
            match part:
                case Part.REST:
                    self._waiting[stream] = group
                case Part.PIECE:
                    self._put(stream, group, len(group), now, last=False)
                case Part.LINES:
                    for line in group[:-1].split(b"\n"):
                        self._put(stream, line, len(line) + 1, now, last=True)
        if self._spool is not None:
            self._spool.tidy(stream)

    def end(self, stream: StreamName) -> None:
        """Send the rest of a line that will not be completed."""
        if self._cache is not None:
            self._cache.end(stream)
        rest = self._waiting.pop(stream, b"")
        if rest:
            self._put(stream, rest, len(rest), time.time_ns(), last=True)

    def delivered(self, stuck_s: float) -> bool:
        """Whether all that can be is sent."""
        return self._queue.delivered(stuck_s)

    def reopen(self) -> None:
        """Connect again, and open the cache again by its name. Raises OSError."""
        self._queue.reconnect()
        if self._cache is not None:
            self._cache.reopen()

    def streams(self) -> Mapping[str, int]:
        """Nothing that could not be opened again."""
        return {}

    def close(self) -> None:
        """Drop what waits and hang up."""
        for stream in tuple(self._waiting):
            self.end(stream)
        self._queue.close()
        if self._cache is not None:
            self._cache.close()
        if self._spool is not None:
            self._spool.close()

    def _put(self, stream: StreamName, text: bytes, size: int, now: int, *, last: bool) -> None:
        before = self._lines.pop(stream, None)
        piece = None
        if before is not None or not last:
            line, number = (before.line, before.number + 1) if before else (os.urandom(16).hex(), 1)
            piece = Piece(line, number, last)
            if not last:
                self._lines[stream] = piece
        self._queue.put(stream, size, self._framing.message(stream, text, now, piece))

    def _done(self, stream: StreamName, size: int, sent: bool) -> None:
        failpoint("shim.log.sent")
        if not sent:
            self.dropped_bytes += size
        if self._spool is not None:
            self._spool.logged(stream, size, _NOWHERE)


class PipingLog:
    """Sends the streams as they are, each to a receiver of its own, which is there once."""

    __slots__ = ("_cache", "_queues", "_receivers", "_spool", "dropped_bytes")

    def __init__(
        self,
        loop: Loop,
        receivers: Mapping[StreamName, Receiver],
        *,
        limit: int = DEFAULT_LIMIT,
        cache: Log | None = None,
        spool: Spool | None = None,
    ) -> None:
        """As SendingLog."""
        self._cache, self._spool, self._receivers = cache, spool, receivers
        self.dropped_bytes = 0
        self._queues = {
            stream: Queue(loop, receiver, limit=limit, on_done=self._done) for stream, receiver in receivers.items()
        }
        for stream, data in unsent(spool).items():
            self.write(stream, data)

    def take(self, stream: StreamName, fd: int, size: int, *, pipe: bool) -> bytes:
        """As SendingLog."""
        return os.read(fd, size) if self._spool is None else self._spool.take(stream, fd, size, pipe=pipe)

    def write(self, stream: StreamName, data: bytes) -> None:
        """Send it, in parts of which each is taken as a whole or not at all."""
        if self._cache is not None:
            self._cache.write(stream, data)
        for at in range(0, len(data), _ATOMIC):
            part = data[at : at + _ATOMIC]
            self._queues[stream].put(stream, len(part), part)
        if self._spool is not None:
            self._spool.tidy(stream)

    def end(self, stream: StreamName) -> None:
        """Nothing but the cache waits for a newline."""
        if self._cache is not None:
            self._cache.end(stream)

    def delivered(self, stuck_s: float) -> bool:
        """Whether all that can be is sent."""
        return all(queue.delivered(stuck_s) for queue in self._queues.values())

    def reopen(self) -> None:
        """Open the cache again by its name. Raises OSError."""
        if self._cache is not None:
            self._cache.reopen()

    def streams(self) -> Mapping[str, int]:
        """The pipes, which cannot be opened again."""
        return {stream: fd for stream, receiver in self._receivers.items() if (fd := receiver.fileno()) >= 0}

    def close(self) -> None:
        """Drop what waits and let the receivers read the end."""
        for queue in self._queues.values():
            queue.close()
        if self._cache is not None:
            self._cache.close()
        if self._spool is not None:
            self._spool.close()

    def _done(self, stream: StreamName, size: int, sent: bool) -> None:
        failpoint("shim.log.sent")
        if not sent:
            self.dropped_bytes += size
        if self._spool is not None:
            self._spool.logged(stream, size, _NOWHERE)


_ATOMIC = 4096
"""Of a pipe: PIPE_BUF."""


def unsent(spool: Spool | None) -> dict[StreamName, bytes]:
    """What the shim before had taken and not sent; the spool is begun."""
    if spool is None:
        return {}
    left = {stream: data for stream in STREAMS if (data := spool.unlogged(stream))}
    spool.begin(STREAMS[0], _NOWHERE)
    return left
