"""A container's terminal: handed to a client's socket, or joined to the terminal of who called."""

import array
import contextlib
import os
import select
import signal
import socket
import sys
import termios
import tty as python_tty
from collections.abc import Iterator

from corral.kernel import tty
from corral.runtime.errors import CommandError

_CHUNK = 32768


def send_descriptor(path: str, fd: int, name: bytes) -> None:
    """Give a descriptor to the unix socket of a client, with a name for it as the message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except OSError as e:
            raise CommandError(f"cannot connect to socket {path}: {e.strerror}") from e
        client.sendmsg([name], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


class Joined:
    """The pty master of a container and the terminal of who called, copied into each other."""

    def __init__(self, master: int, poller: "select.poll") -> None:
        self._master, self._poller = master, poller
        self._to_master = b""
        os.set_blocking(master, False)
        poller.register(master, select.POLLIN)
        self._stdin_is_open, self._listens = True, False
        self._listen()
        self.resize()

    def _listen(self) -> None:
        """Take input as long as there is none that the container has yet to take."""
        wanted = self._stdin_is_open and not self._to_master
        if wanted and not self._listens:
            self._poller.register(0, select.POLLIN)
        elif self._listens and not wanted:
            self._poller.unregister(0)
        self._listens = wanted

    def resize(self) -> None:
        """Give the container's terminal the caller's size."""
        with contextlib.suppress(OSError):
            width, height = tty.window_size(0)
            tty.set_window_size(self._master, width=width, height=height)

    def handle(self, fd: int) -> None:
        """Copy what is there."""
        if fd == self._master:
            self._flush()
            self.copy_output()
        elif fd == 0 and self._listens:
            self._to_master = os.read(0, _CHUNK)
            self._stdin_is_open = bool(self._to_master)
            self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while self._to_master:
                self._to_master = self._to_master[os.write(self._master, self._to_master) :]
        with contextlib.suppress(KeyError, OSError):
            self._poller.modify(self._master, select.POLLIN | (select.POLLOUT if self._to_master else 0))
        self._listen()

    def copy_output(self) -> bool:
        """Write what the container wrote; False if there is nothing (more)."""
        try:
            data = os.read(self._master, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the other end open
            with contextlib.suppress(KeyError):
                self._poller.unregister(self._master)
            return False
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]
        return bool(data)


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """The caller's terminal passes every key on; as it was, afterwards. Without one there is nothing to do."""
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    python_tty.setraw(0)
    try:
        yield
    finally:
        # Whoever resets it from the background would be stopped.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        sys.stdout.flush()
