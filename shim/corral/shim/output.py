"""One output stream of a process, read once and given to the log, the replay buffer and every attached client.

                                .--> log
    process --> FIFO or pty --> +--> replay (the last REPLAY_SIZE bytes)
                                +--> client, lossless: while it lags, nothing more is read (backpressure)
                                '--> client, lossy: a backlog of LOSSY_BACKLOG at most, then bytes are dropped, counted

Once the process has exited there is no backpressure: what it left in the pipe is taken over at once, so that its exit
can be reported, and clients get the rest from their backlog.
"""

import errno
import os
import time
from collections import deque
from collections.abc import Callable

from corral.shim.loop import ERROR_ONLY, OUT, Loop, Timer
from corral.shim.loop import IN as READABLE

REPLAY_SIZE = 64 << 10
LOSSY_BACKLOG = 1 << 20
READ_SIZE = 64 << 10
LARGE_READ_SIZE = 512 << 10
DRAIN_LIMIT = 8 << 20
HUNG_UP_RETRY_S = 0.1


class ClientOutput:
    """One client's end of a stream. Owns its fd, and closes it when the client is gone or the stream was delivered."""

    __slots__ = (
        "_backlog",
        "_fd",
        "_finishing",
        "_loop",
        "_on_change",
        "backlog_bytes",
        "dropped_bytes",
        "lossless",
        "progress_at",
    )

    def __init__(self, loop: Loop, fd: int, *, lossless: bool, on_change: Callable[["ClientOutput"], None]) -> None:
        """on_change is called after a backlog shrank to nothing and after the end was closed."""
        self._loop, self._fd, self.lossless, self._on_change = loop, fd, lossless, on_change
        self._backlog: deque[memoryview] = deque()
        self._finishing = False
        self.backlog_bytes = self.dropped_bytes = 0
        self.progress_at = time.monotonic()
        os.set_blocking(fd, False)
        loop.watch(fd, ERROR_ONLY, self._on_ready)

    @property
    def closed(self) -> bool:
        """Whether this client gets no more."""
        return self._fd < 0

    def write(self, data: bytes) -> None:
        """Deliver, or keep for later, or drop and count."""
        if self.closed:
            return
        if self._backlog:
            self._keep(memoryview(data))
            return
        written = self._write_now(data)
        if 0 <= written < len(data):
            self._keep(memoryview(data)[written:])
            self._loop.watch(self._fd, OUT, self._on_ready)

    def finish(self) -> None:
        """The stream ended: close as soon as all is delivered, which is the client's EOF."""
        self._finishing = True
        if not self._backlog:
            self.close()

    def close(self) -> None:
        """Give up whatever is not delivered."""
        if self.closed:
            return
        fd, self._fd = self._fd, -1
        self._backlog.clear()
        self.backlog_bytes = 0
        self._loop.forget(fd)
        os.close(fd)
        self._on_change(self)

    def _keep(self, rest: memoryview) -> None:
        if not self.lossless and self.backlog_bytes + len(rest) > LOSSY_BACKLOG:
            kept = max(0, LOSSY_BACKLOG - self.backlog_bytes)
            self.dropped_bytes += len(rest) - kept
            rest = rest[:kept]
        if rest:
            self._backlog.append(rest)
            self.backlog_bytes += len(rest)

    def _write_now(self, data: bytes | memoryview) -> int:
        """How much was taken; -1 if the client is gone."""
        try:
            written = os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            self.close()
            return -1
        self.progress_at = time.monotonic()
        return written

    def _on_ready(self, events: int) -> None:
        if not events & OUT or not self._backlog:
            self.close()  # nobody reads any more
            return
        while self._backlog:
            data = self._backlog[0]
            written = self._write_now(data)
            if written < 0:
                return
            self.backlog_bytes -= written
            if written < len(data):
                self._backlog[0] = data[written:]
                return
            self._backlog.popleft()
        if self._finishing:
            self.close()
            return
        self._loop.watch(self._fd, ERROR_ONLY, self._on_ready)
        self._on_change(self)


class Output:
    """Reads a stream to its end and hands it on."""

    __slots__ = (
        "_clients",
        "_dropped_bytes",
        "_ended",
        "_exited",
        "_fd",
        "_loop",
        "_on_end",
        "_read_size",
        "_replay",
        "_retry",
        "_take",
        "_tap",
        "_terminal",
        "_watching",
    )

    def __init__(
        self,
        loop: Loop,
        *,
        take: Callable[[int, int], bytes] = os.read,
        tap: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        """take reads, of an fd as many bytes at most; tap gets every byte, on_end is called once; clients may attach
        before there is anything to read."""
        self._loop, self._take, self._tap, self._on_end = loop, take, tap, on_end
        self._fd = -1
        self._terminal = self._exited = self._ended = self._watching = False
        self._read_size = READ_SIZE
        self._replay = bytearray()
        self._retry: Timer | None = None
        self._clients: list[ClientOutput] = []
        self._dropped_bytes = 0  # by clients that are gone

    @property
    def ended(self) -> bool:
        """Whether there will be no more output."""
        return self._ended

    @property
    def fd(self) -> int:
        """What is read, -1 if nothing is."""
        return self._fd

    def begin(self, fd: int, *, terminal: bool) -> None:
        """Start reading fd, and own it. With a terminal, fd is the master and its hang-up is no end before the exit."""
        self._fd, self._terminal = fd, terminal
        os.set_blocking(fd, False)
        self._regulate()

    def attach(self, fd: int, *, lossless: bool, replay: bool) -> None:
        """Give the stream to one more client, who may first get the recent output. Owns fd."""
        client = ClientOutput(self._loop, fd, lossless=lossless, on_change=self._client_changed)
        self._clients.append(client)
        if replay and self._replay:
            client.write(bytes(self._replay))
        if self._ended:
            client.finish()
        self._regulate()

    def drain(self) -> None:
        """The process has exited: take what it left. If another process holds the stream it goes on until abandon()."""
        self._exited = True
        taken = 0
        while not self._ended and taken < DRAIN_LIMIT:
            data = self._read()
            if data is None:
                break
            taken += len(data)
        self._regulate()

    def abandon(self) -> None:
        """Tell the clients it is over, though somebody may still write: that is read for nothing, so nobody blocks."""
        if self._ended:
            return
        if self._fd >= 0 and not self._terminal:
            fd, self._fd = self._fd, -1
            self._loop.watch(fd, READABLE, lambda _events: _discard(self._loop, fd))
        self._end()

    def delivered(self, stuck_s: float) -> bool:
        """Whether no client will take more: all have everything, or took no byte for that many seconds."""
        latest = time.monotonic() - stuck_s
        return all(client.progress_at < latest for client in self._clients)

    @property
    def dropped_bytes(self) -> int:
        """Bytes that clients, those that are gone too, did not get because they were slow."""
        return self._dropped_bytes + sum(client.dropped_bytes for client in self._clients)

    def close(self) -> None:
        """End at once, delivered or not."""
        if not self._ended:
            self._end()
        for client in tuple(self._clients):
            self._dropped_bytes += client.backlog_bytes
            client.close()

    def _on_ready(self, _events: int) -> None:
        self._read()

    def _read(self) -> bytes | None:
        """One read, handed on. None: nothing there now, or the end."""
        try:
            data = self._take(self._fd, self._read_size)
        except BlockingIOError:
            return None
        except OSError as e:
            if e.errno == errno.EIO and self._terminal and not self._exited:
                self._wait_for_reopening()
            else:
                self._end()
            return None
        if not data:
            self._end()
            return None
        self._read_size = LARGE_READ_SIZE if len(data) >= READ_SIZE else READ_SIZE
        self._deliver(data)
        return data

    def _deliver(self, data: bytes) -> None:
        self._tap(data)
        self._replay += data[-REPLAY_SIZE:]
        if len(self._replay) > REPLAY_SIZE:
            del self._replay[:-REPLAY_SIZE]
        for client in tuple(self._clients):
            client.write(data)
        self._regulate()

    def _regulate(self) -> None:
        """Read only while no lossless client lags; after the exit, always."""
        lagging = not self._exited and any(client.lossless and client.backlog_bytes for client in self._clients)
        wanted = self._fd >= 0 and not lagging and self._retry is None
        if wanted == self._watching:
            return
        self._watching = wanted
        if wanted:
            self._loop.watch(self._fd, READABLE, self._on_ready)
        else:
            # Not just an empty event mask: a pipe without writers reports EPOLLHUP unasked, for ever.
            self._loop.forget(self._fd)

    def _wait_for_reopening(self) -> None:
        """No process has the terminal open, which reads as EIO; one may open it again."""
        self._retry = self._loop.call_later(HUNG_UP_RETRY_S, self._try_again)
        self._regulate()

    def _try_again(self) -> None:
        self._retry = None
        self._regulate()

    def _end(self) -> None:
        self._ended = True
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._loop.forget(fd)
            os.close(fd)
        self._watching = False
        for client in tuple(self._clients):
            client.finish()
        self._on_end()

    def _client_changed(self, client: ClientOutput) -> None:
        if client.closed:
            self._clients.remove(client)
            self._dropped_bytes += client.dropped_bytes
        self._regulate()


def _discard(loop: Loop, fd: int) -> None:
    try:
        if os.read(fd, READ_SIZE):
            return
    except BlockingIOError:
        return
    except OSError:
        pass
    loop.forget(fd)
    os.close(fd)
