"""Output on its way to somebody else.

    log.write --> outbox --> receiver
                     '-----> the spool's mark    what was sent or dropped, and only that

What waits lies in the spool too, so the shim after one that was killed sends it; what that had sent without saying so
is sent twice.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from corral.kernel.failpoint import failpoint
from corral.shim.logs import Log, Part, cut
from corral.shim.loop import Loop
from corral.shim.outbox import Outbox, Receiver
from corral.shim.spool import STREAMS, Position, Spool, StreamName

DEFAULT_LIMIT = 1 << 20
_NOWHERE: Position = (0, 0)
"""There is no file, and no telling how far a receiver had come but by the mark."""


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

    __slots__ = ("_cache", "_framing", "_lines", "_outbox", "_spool", "_tell", "_waiting")

    def __init__(
        self,
        loop: Loop,
        receiver: Receiver,
        framing: Framing,
        *,
        limit: int = DEFAULT_LIMIT,
        cache: Log | None = None,
        spool: Spool | None = None,
        tell: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """receiver: connected; owned from here on, as are the cache and the spool. tell: what no client asked for."""
        self._framing, self._cache, self._spool, self._tell = framing, cache, spool, tell
        self._waiting: dict[StreamName, bytes] = {}
        self._lines: dict[StreamName, Piece] = {}
        self._outbox = Outbox(loop, receiver, limit=limit, on_done=self._done)
        for stream, (data, uncached) in unsent(spool).items():
            self._keep(stream, uncached)
            self._send(stream, data)

    def take(self, stream: StreamName, fd: int, size: int, *, pipe: bool) -> bytes:
        """Read what is to be sent next; should this process be killed before it is, it is not lost."""
        return os.read(fd, size) if self._spool is None else self._spool.take(stream, fd, size, pipe=pipe)

    def write(self, stream: StreamName, data: bytes) -> None:
        """Send the lines that are complete now, with the present time."""
        self._keep(stream, data)
        self._send(stream, data)

    def _keep(self, stream: StreamName, data: bytes) -> None:
        if self._cache is not None:
            self._cache.write(stream, data)
            if self._spool is not None:
                self._spool.copied(stream)

    def _send(self, stream: StreamName, data: bytes) -> None:
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

    @property
    def dropped_bytes(self) -> int:
        """The container's bytes that were not sent, and won't be."""
        return self._outbox.dropped_bytes

    def delivered(self, stuck_s: float) -> bool:
        """Whether all that can be is sent."""
        return self._outbox.delivered(stuck_s)

    def reopen(self) -> None:
        """Connect again, and open the cache again by its name. Raises OSError."""
        self._outbox.reconnect()
        if self._cache is not None:
            self._cache.reopen()

    def streams(self) -> Mapping[str, int]:
        """Nothing that could not be opened again."""
        return {}

    def close(self) -> None:
        """Drop what waits and hang up."""
        for stream in tuple(self._waiting):
            self.end(stream)
        self._outbox.close()
        if self._cache is not None:
            _close(self._cache, self._tell)
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
        self._outbox.put(stream, size, self._framing.message(stream, text, now, piece))

    def _done(self, stream: StreamName, size: int) -> None:
        failpoint("shim.log.sent")
        if self._spool is not None:
            self._spool.logged(stream, size, _NOWHERE)


class PipingLog:
    """Sends the streams as they are, each to a receiver of its own, which is there once."""

    __slots__ = ("_cache", "_held", "_lost_told", "_outboxes", "_receivers", "_spool", "_tell")

    def __init__(
        self,
        loop: Loop,
        receivers: Mapping[StreamName, Receiver],
        *,
        held: Mapping[str, int] | None = None,
        limit: int = DEFAULT_LIMIT,
        cache: Log | None = None,
        spool: Spool | None = None,
        tell: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """As SendingLog. held: what is to be kept with the receivers, for the same time; owned."""
        self._cache, self._spool, self._receivers, self._tell = cache, spool, receivers, tell
        self._held = dict(held or {})
        self._lost_told = False
        self._outboxes = {
            stream: Outbox(loop, receiver, limit=limit, on_done=self._done) for stream, receiver in receivers.items()
        }
        for stream, (data, uncached) in unsent(spool).items():
            self._keep(stream, uncached)
            self._send(stream, data)

    def take(self, stream: StreamName, fd: int, size: int, *, pipe: bool) -> bytes:
        """As SendingLog."""
        return os.read(fd, size) if self._spool is None else self._spool.take(stream, fd, size, pipe=pipe)

    def write(self, stream: StreamName, data: bytes) -> None:
        """Send it, in parts of which each is taken as a whole or not at all."""
        self._keep(stream, data)
        self._send(stream, data)

    def _keep(self, stream: StreamName, data: bytes) -> None:
        if self._cache is not None:
            self._cache.write(stream, data)
            if self._spool is not None:
                self._spool.copied(stream)

    def _send(self, stream: StreamName, data: bytes) -> None:
        for at in range(0, len(data), _ATOMIC):
            part = data[at : at + _ATOMIC]
            self._outboxes[stream].put(stream, len(part), part)
        if self._spool is not None:
            self._spool.tidy(stream)

    def end(self, stream: StreamName) -> None:
        """Nothing but the cache waits for a newline."""
        if self._cache is not None:
            self._cache.end(stream)

    @property
    def dropped_bytes(self) -> int:
        """As SendingLog."""
        return sum(outbox.dropped_bytes for outbox in self._outboxes.values())

    def delivered(self, stuck_s: float) -> bool:
        """Whether all that can be is sent."""
        return all(outbox.delivered(stuck_s) for outbox in self._outboxes.values())

    def reopen(self) -> None:
        """Open the cache again by its name. Raises OSError."""
        if self._cache is not None:
            self._cache.reopen()

    def streams(self) -> Mapping[str, int]:
        """The pipes and what is held with them, which cannot be opened again."""
        pipes = {stream: receiver.fileno() for stream, receiver in self._receivers.items()}
        return {name: fd for name, fd in (self._held | pipes).items() if fd >= 0}

    def close(self) -> None:
        """Drop what waits and let the receivers read the end."""
        self._lost_told = True  # who is let go is not lost
        for outbox in self._outboxes.values():
            outbox.close()
        while self._held:
            os.close(self._held.popitem()[1])
        if self._cache is not None:
            _close(self._cache, self._tell)
        if self._spool is not None:
            self._spool.close()

    def _done(self, stream: StreamName, size: int) -> None:
        failpoint("shim.log.sent")
        if not self._lost_told and self._receivers[stream].fileno() < 0:
            self._lost_told = True
            self._tell(
                "log: the logging program has ended, or closed what it was to read: that is dropped from here on"
            )
        if self._spool is not None:
            self._spool.logged(stream, size, _NOWHERE)


_ATOMIC = 4096
"""Of a pipe: PIPE_BUF."""


def _close(cache: Log, tell: Callable[[str], None]) -> None:
    cache.close()
    if cache.dropped_bytes:
        tell(f"log: the copy that is kept beside lacks {cache.dropped_bytes} bytes, which the disk did not take")


def unsent(spool: Spool | None) -> dict[StreamName, tuple[bytes, bytes]]:
    """What the shim before had taken and not sent, and what of that is in no cache; the spool is begun."""
    if spool is None:
        return {}
    left = {stream: (data, _uncached(spool, stream, data)) for stream in STREAMS if (data := spool.unlogged(stream))}
    spool.begin(STREAMS[0], _NOWHERE)
    return left


def _uncached(spool: Spool, stream: StreamName, data: bytes) -> bytes:
    """A cache has waited for the end of a line that was begun, and lost it."""
    copied = spool.copied_of_unlogged(stream)
    begun = next((group for part, group in cut(data[:copied]) if part is Part.REST), b"")
    return begun + data[copied:]
