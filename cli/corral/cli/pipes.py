"""The pipes of a process themselves, for a client on its host: much data then passes by gRPC and the daemon.

a process's pipe --splice(2)--> our stdout
our stdin        --splice(2)--> its pipe
"""

import errno
import os
import secrets
import select
import socket
import threading
from collections.abc import Callable, Sequence

from corral.api.tasks.v1 import tasks_pb2
from corral.cli.terminal import write_all

_MOST = 1 << 20
_PIPES = 3
# The daemon sends them before it says so.
_PATIENCE_S = 5.0


class Taker:
    """Where the daemon hands them over."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._name, self._secret = f"corral-{secrets.token_hex(8)}", secrets.token_bytes(16)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"\0{self._name}")
        self._socket.listen()
        self._socket.settimeout(_PATIENCE_S)

    def request(self, *, stdin: bool) -> tasks_pb2.AttachRequest:
        """Asks for stdin's, or for those of the output."""
        take = tasks_pb2.Take(socket=self._name, stdin=stdin, secret=self._secret, pid=os.getpid())
        return tasks_pb2.AttachRequest(take=take)

    def receive(self, streams: Sequence[str]) -> dict[str, int]:
        """Those that the daemon says it has sent, by their names. Raises OSError."""
        with self._socket:
            while True:
                with self._socket.accept()[0] as connection:
                    connection.settimeout(_PATIENCE_S)
                    said, fds, _, _ = socket.recv_fds(connection, len(self._secret), _PIPES)
                if said == self._secret:
                    return dict(zip(streams, fds, strict=True))
                for fd in fds:  # of somebody else, who has found the socket
                    os.close(fd)

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
        try:
            while self._move():
                pass
        except OSError as e:
            self.failure = e
            self._on_failure()
        finally:
            os.close(self._pipe)

    def _move(self) -> int:
        try:
            return os.splice(self._pipe, self._target, _MOST)
        except BlockingIOError:  # the target's fault: somebody has set it so
            select.select([], [self._target], [])
            return 1
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
        # Not all kinds of files take it: one that is appended to does not.
        write_all(self._target, data := os.read(self._pipe, _MOST))
        return len(data)


class Input:
    """Moves our stdin to a pipe, as much as there is and it takes. Owns the pipe."""

    def __init__(self, pipe: int) -> None:
        self.fd = pipe
        self.is_full = False
        """Whether it is the pipe that has to be waited for."""
        self._rest = memoryview(b"")
        os.set_blocking(pipe, False)

    def move(self) -> bool:
        """To be called when there is something to read, or an end; False, and the pipe closed, if that was the last."""
        try:
            more = self._splice()
        except BlockingIOError:
            self.is_full = more = True
        except BrokenPipeError:  # the process wants no more
            more = False
        if not more:
            os.close(self.fd)
        return more

    def go_on(self) -> bool:
        """To be called when there is room in the pipe; as move()."""
        self.is_full = False
        return not self._rest or self.move()

    def _splice(self) -> bool:
        if not self._rest:
            try:
                return os.splice(0, self.fd, _MOST, flags=os.SPLICE_F_NONBLOCK) > 0
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
            self._rest = memoryview(os.read(0, _MOST))
            if not self._rest:
                return False
        while self._rest:
            self._rest = self._rest[os.write(self.fd, self._rest) :]
        return True
