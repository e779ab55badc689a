"""The pipes of a process themselves, for a client on its host: much data then passes by gRPC and the daemon.

a process's pipe --splice(2)--> our stdout
our stdin        --splice(2)--> its pipe
"""

import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Sequence

from corral.api.tasks.v1 import tasks_pb2
from corral.cli.terminal import write_all

_MOST = 1 << 20
_PIPES = 3


class Taker:
    """Where the daemon hands them over."""

    def __init__(self) -> None:
        """Raises OSError."""
        # The module secrets would load a dozen others, for every command that takes more than a second.
        self._name, self._secret = f"corral-{os.urandom(8).hex()}", os.urandom(16)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"\0{self._name}")
        self._socket.listen()
        self._socket.setblocking(False)

    def request(self, *, stdin: bool) -> tasks_pb2.AttachRequest:
        """Asks for stdin's, or for those of the output."""
        take = tasks_pb2.Take(socket=self._name, stdin=stdin, secret=self._secret, pid=os.getpid())
        return tasks_pb2.AttachRequest(take=take)

    def receive(self, streams: Sequence[str]) -> dict[str, int]:
        """Those that the daemon says it has sent, by their names. Raises OSError.

        So they are here, and nobody is waited for: others, who have found the socket, may connect and say nothing.
        """
        with self._socket:
            while True:
                try:
                    connection, _ = self._socket.accept()
                except BlockingIOError as e:
                    raise ConnectionAbortedError("pipes of the process were sent, and have not come") from e
                with connection:
                    said, fds = self._said(connection)
                if said == self._secret and len(fds) == len(streams):
                    return dict(zip(streams, fds, strict=True))
                for fd in fds:
                    os.close(fd)

    def _said(self, connection: socket.socket) -> tuple[bytes, list[int]]:
        connection.setblocking(False)
        try:
            said, fds, _, _ = socket.recv_fds(connection, len(self._secret), _PIPES)
        except OSError:
            return b"", []
        return said, fds

    def close(self) -> None:
        """None will come; harmless when repeated."""
        self._socket.close()


class Output(threading.Thread):
    """Moves what comes out of a pipe to a file of ours, to its end. Owns the pipe."""

    def __init__(self, pipe: int, target: int, on_failure: Callable[[], object]) -> None:
        """on_failure is called, by the thread, once the target can't be written to; `failure` is then set."""
        super().__init__(name="output", daemon=True)
        self.failure: OSError | None = None
        self._pipe, self._target, self._on_failure = pipe, target, on_failure
        os.set_blocking(pipe, True)

    def run(self) -> None:
        """See the class."""
        move = self._splice if _is_stream(self._target) else self._copy
        try:
            while move():
                pass
        except OSError as e:
            self.failure = e
            self._on_failure()
        finally:
            os.close(self._pipe)

    def _splice(self) -> int:
        try:
            return os.splice(self._pipe, self._target, _MOST)
        except BlockingIOError:  # the target is set so, by somebody, and either of them has to be waited for
            select.select([self._pipe], [], [])
            select.select([], [self._target], [])
            return 1

    def _copy(self) -> int:
        write_all(self._target, data := os.read(self._pipe, _MOST))
        return len(data)


def _is_stream(fd: int) -> bool:
    """Whether it may be spliced. In a file, splice(2) goes by the offset as it was before it waited, whoever has
    written there meanwhile; terminals, and files that are appended to, don't take it.
    """
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class Input:
    """Moves our stdin to a pipe, as much as there is and it takes. Owns the pipe."""

    def __init__(self, pipe: int) -> None:
        self.fd = pipe
        self.is_full = False
        """Whether it is the pipe that has to be waited for."""
        self._splices = _is_stream(0)
        self._rest = memoryview(b"")
        os.set_blocking(pipe, False)

    def move(self) -> bool:
        """To be called when there is something to read, or an end; False, and the pipe closed, if that was the last."""
        try:
            more = self._splice() if self._splices else self._copy()
        except BlockingIOError:
            self.is_full = more = True
        except OSError:  # the process wants no more, or stdin has come to a bad end
            more = False
        if not more:
            os.close(self.fd)
        return more

    def go_on(self) -> bool:
        """To be called when there is room in the pipe; as move()."""
        self.is_full = False
        return not self._rest or self.move()

    def _splice(self) -> bool:
        return os.splice(0, self.fd, _MOST, flags=os.SPLICE_F_NONBLOCK) > 0

    def _copy(self) -> bool:
        self._rest = self._rest or memoryview(os.read(0, _MOST))
        if not self._rest:
            return False
        while self._rest:
            self._rest = self._rest[os.write(self.fd, self._rest) :]
        return True
