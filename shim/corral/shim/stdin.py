"""The standard input of a process, merged from any number of clients, with backpressure to all of them.

A process that closed its standard input makes every client's end close; one that merely does not read makes them wait.

From a client's pipe splice(2) moves bytes to the process in one step: what this process has not passed on when it is
killed is in that pipe still, for who has kept its end.
"""

import fcntl
import os
import stat
import struct
import termios
from collections.abc import Callable

from corral.shim.loop import ERROR_ONLY, IN, OUT, Loop

READ_SIZE = 64 << 10
LARGE_READ_SIZE = 1 << 20
_INT = struct.Struct("=i")


class ClientInput:
    """One client's end. `once`: its EOF ends the standard input, unless other clients are attached."""

    __slots__ = ("fd", "is_pipe", "once", "watching")

    def __init__(self, fd: int, *, once: bool) -> None:
        self.fd, self.once, self.watching = fd, once, False
        self.is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)

    @property
    def has_more(self) -> bool:
        """Whether something that it sent is still to be passed on."""
        return bool(self.is_pipe and _INT.unpack(fcntl.ioctl(self.fd, termios.FIONREAD, bytes(_INT.size)))[0])


class Stdin:
    """Writes what clients send; begin() tells where to."""

    __slots__ = (
        "_clients",
        "_closing",
        "_ended",
        "_fd",
        "_full",
        "_loop",
        "_on_close",
        "_read_size",
        "_splices",
        "_terminal",
        "_unwritten",
    )

    def __init__(self, loop: Loop, *, on_close: Callable[[], None] = lambda: None) -> None:
        """on_close is called once, when the process is to get no more."""
        self._loop, self._fd, self._on_close = loop, -1, on_close
        self._terminal = self._closing = self._ended = False
        self._clients: dict[int, ClientInput] = {}
        self._splices, self._full = True, False
        self._unwritten = memoryview(b"")
        self._read_size = READ_SIZE

    @property
    def ended(self) -> bool:
        """Whether the process gets no more input."""
        return self._ended

    @property
    def fd(self) -> int:
        """What is written to, -1 if nothing is."""
        return self._fd

    def begin(self, fd: int, *, terminal: bool) -> None:
        """Start writing to fd: a pipe, or a terminal's master. Owns fd."""
        self._fd, self._terminal = fd, terminal
        os.set_blocking(fd, False)
        self._regulate()

    def attach(self, fd: int, *, once: bool) -> None:
        """Take input from one more client. Owns fd."""
        if self._ended or self._closing:
            os.close(fd)
            return
        os.set_blocking(fd, False)
        self._clients[fd] = ClientInput(fd, once=once)
        self._regulate()

    def close_when_written(self) -> None:
        """The process reads EOF after what was sent so far; a terminal gets its end-of-file character instead."""
        if self._ended or self._closing:
            return
        if self._terminal:
            self._unwritten = memoryview(bytes(self._unwritten) + _end_of_file(self._fd))
            self._write()
            return
        self._closing = True
        self._close_if_written()

    def _close_if_written(self) -> None:
        for client in tuple(self._clients.values()):
            if not client.has_more:
                self._drop(client)
        if self._fd >= 0 and not self._unwritten and not self._clients:
            self.close()
        else:
            self._regulate()

    def close(self) -> None:
        """End at once: the process is gone, or does not want more."""
        ended, self._ended = self._ended, True
        self._drop_clients()
        self._unwritten = memoryview(b"")
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._loop.forget(fd)
            os.close(fd)
        if not ended:
            self._on_close()

    def _drop_clients(self) -> None:
        for client in tuple(self._clients.values()):
            self._drop(client)

    def _drop(self, client: ClientInput) -> None:
        if client.watching:
            self._loop.forget(client.fd)
        del self._clients[client.fd]
        os.close(client.fd)

    def _regulate(self) -> None:
        """Either wait for clients to send, or for the process to take what they sent."""
        if self._fd < 0:
            return
        blocked = bool(self._unwritten) or self._full
        if blocked:
            self._loop.watch(self._fd, OUT, self._on_process)
        elif self._terminal:
            self._loop.forget(self._fd)  # its hang-up is the output's affair
        else:
            self._loop.watch(self._fd, ERROR_ONLY, self._on_process)
        for client in self._clients.values():
            if client.watching == blocked:
                client.watching = not blocked
                if blocked:
                    self._loop.forget(client.fd)
                else:
                    self._watch(client)

    def _watch(self, client: ClientInput) -> None:
        self._loop.watch(client.fd, IN, lambda _events: self._on_client(client))

    def _on_client(self, client: ClientInput) -> None:
        if client.is_pipe and self._splices:
            self._splice(client)
        else:
            self._pass_on(client)
        if self._closing and not self._ended:
            self._close_if_written()

    def _splice(self, client: ClientInput) -> None:
        try:
            moved = os.splice(client.fd, self._fd, LARGE_READ_SIZE, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            self._full = True  # there is something to read, so it is the process that takes no more
            self._regulate()
        except BrokenPipeError:
            self.close()
        except OSError:  # a kind of terminal that does not take it
            self._splices = False
        else:
            if not moved:
                self._client_ended(client)

    def _pass_on(self, client: ClientInput) -> None:
        try:
            data = os.read(client.fd, self._read_size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._client_ended(client)
            return
        self._read_size = LARGE_READ_SIZE if len(data) == self._read_size else READ_SIZE
        self._unwritten = memoryview(data)
        self._write()

    def _client_ended(self, client: ClientInput) -> None:
        self._drop(client)
        # A terminal stays: whoever detached may come back.
        if client.once and not self._clients and not self._terminal:
            self.close_when_written()

    def _on_process(self, events: int) -> None:
        if events & OUT and self._full:
            self._full = False
            self._regulate()
        elif events & OUT and self._unwritten:
            self._write()
        else:
            self.close()

    def _write(self) -> None:
        try:
            while self._fd >= 0 and self._unwritten:
                self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._closing and not self._unwritten and not self._clients:
            self.close()
        else:
            self._regulate()


def _end_of_file(master: int) -> bytes:
    """What a user would type to end input: VEOF where the terminal is in line mode, else nothing."""
    if master < 0:
        return b""
    try:
        attributes = termios.tcgetattr(master)
    except termios.error:
        return b""
    return attributes[6][termios.VEOF] if attributes[3] & termios.ICANON else b""
