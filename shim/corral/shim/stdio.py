"""The standard streams of one process, as the shim holds them.

Without a terminal, stdout and stderr are FIFOs in the bundle that the process opens read-write (through descriptors
made here): were the shim to die, the process gets no SIGPIPE and a new shim can open them again. stdin is a plain pipe,
since a FIFO opened read-write would never read as ended. That and a terminal's master can't be opened a second time:
who wants them to outlive this process asks for copies (streams), and hands them to the next one (resume).
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence

from corral.kernel import tty
from corral.oci.runtime import Stdio
from corral.shim.errors import ShimError
from corral.shim.logs import Log
from corral.shim.loop import Loop
from corral.shim.output import Output
from corral.shim.requests import CONSOLE, STDIN, Attach
from corral.shim.spool import STREAMS, StreamName
from corral.shim.stdin import Stdin
from corral.shim.wire import close_all

PIPE_SIZE = 1 << 20
# A process that is not root opens /dev/stdout through /proc, which asks for this; nobody else gets into the bundle.
_ANYBODY = 0o666


class ProcessIO:
    """Connects a process, from before it exists until after its end, to its log and its clients."""

    __slots__ = ("_directory", "_log", "_loop", "_on_end", "_outputs", "_prefix", "_stdin", "console", "terminal")

    def __init__(
        self,
        loop: Loop,
        log: Log,
        *,
        terminal: bool,
        stdin: bool,
        directory: int,
        prefix: str | None,
        on_end: Callable[[], None],
        on_stdin_close: Callable[[], None] = lambda: None,
    ) -> None:
        """FIFOs will be called <prefix>stdout and <prefix>stderr in the directory (an fd). on_end: no more output.

        prefix None: all output comes by one pipe without a name, of a process that nobody will look after but this one.
        on_stdin_close: the process gets no more input.
        """
        self._loop, self._log, self._on_end, self.terminal = loop, log, on_end, terminal
        self._directory, self._prefix = directory, prefix
        self._stdin = Stdin(loop, on_close=on_stdin_close) if stdin else None
        names = STREAMS[:1] if terminal or prefix is None else STREAMS
        self._outputs = {name: self._output(name) for name in names}
        self.console = -1

    @contextlib.contextmanager
    def child_ends(self) -> Iterator[Stdio]:
        """The ends that the process inherits, for as long as it takes to make it. After an error all is closed."""
        inherited: list[int] = []
        try:
            if self.terminal:
                yield Stdio(None, None, None)
            else:
                yield self._open_pipes(inherited)
        except BaseException:
            self.close()
            raise
        finally:
            close_all(inherited)

    def log_to(self, log: Log) -> None:
        """Another log than at first, before there is any output."""
        self._log = log

    def begin(self, console: int | None) -> None:
        """The process exists: start moving bytes. With a terminal, console is its master, owned from here on."""
        if console is not None:
            self.console = console
            self._outputs["stdout"].begin(os.dup(console), terminal=True)
            if self._stdin is not None:
                self._stdin.begin(os.dup(console), terminal=True)

    def streams(self) -> dict[str, int]:
        """What another process needs to keep for resume(), by name; the fds stay this one's."""
        fds: dict[str, int] = {CONSOLE: self.console}
        if not self.terminal:
            fds = {name: each.fd for name, each in self._outputs.items()}
        if self._stdin is not None and not self.terminal:
            fds[STDIN] = self._stdin.fd
        return {name: fd for name, fd in fds.items() if fd >= 0}

    def resume(self, streams: Mapping[str, int]) -> None:
        """Go on where a shim that was killed has ended; the fds, those of streams(), are owned from here on.

        A FIFO that did not come along is opened by its name. What is not to be had has ended.
        """
        if self.terminal:
            if CONSOLE in streams:
                self.begin(streams[CONSOLE])
                return
            self.abandon()
        else:
            for name, output in self._outputs.items():
                try:
                    output.begin(streams[name] if name in streams else self._reopen(name), terminal=False)
                except FileNotFoundError:
                    output.abandon()
        if self._stdin is not None:
            if STDIN in streams:
                self._stdin.begin(streams[STDIN], terminal=False)
            else:
                self._stdin.close()

    def _reopen(self, name: str) -> int:
        return os.open(f"{self._prefix}{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._directory)

    def attach(self, request: Attach, fds: Sequence[int]) -> None:
        """Connect a client, whose descriptors are owned from here on (closed on any error)."""
        try:
            self._check(request, fds)
        except BaseException:
            close_all(fds)
            raise
        ends = list(fds)
        if request.stdin and self._stdin is not None:
            self._stdin.attach(ends.pop(0), once=request.stdin_once)
        for name, wanted in zip(STREAMS, (request.stdout, request.stderr), strict=True):
            if wanted:
                self._outputs[name].attach(ends.pop(0), lossless=request.lossless, replay=request.replay)

    def _check(self, request: Attach, fds: Sequence[int]) -> None:
        if request.stdin and self._stdin is None:
            raise ShimError("failed_precondition", "the process was made without a standard input to attach to")
        if request.stderr and self.terminal:
            raise ShimError("invalid_argument", "stderr: a terminal has one output, stdout")
        for fd in fds:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                raise ShimError("invalid_argument", "only pipes and sockets can be attached")

    def close_stdin(self) -> None:
        """Let the process read EOF once it has read what was sent. Raises ShimError if it has no input."""
        if self._stdin is None:
            raise ShimError("failed_precondition", "the process was made without a standard input")
        self._stdin.close_when_written()

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's size. Raises ShimError if there is none."""
        if self.console < 0:
            raise ShimError("failed_precondition", "the process has no terminal")
        tty.set_window_size(self.console, width=width, height=height)

    def process_exited(self) -> None:
        """Take what the process left; input is no longer wanted."""
        if self._stdin is not None:
            self._stdin.close()
        for output in self._outputs.values():
            output.drain()

    @property
    def ended(self) -> bool:
        """Whether all output was read to its end."""
        return all(output.ended for output in self._outputs.values())

    def abandon(self) -> None:
        """Some other process keeps the streams open: end them for clients, but never let it block."""
        for output in self._outputs.values():
            output.abandon()

    def delivered(self, stuck_s: float) -> bool:
        """Whether clients have all, or none of them took a byte for that many seconds."""
        return all(output.delivered(stuck_s) for output in self._outputs.values())

    @property
    def dropped_bytes(self) -> int:
        """Bytes that slow clients did not get."""
        return sum(output.dropped_bytes for output in self._outputs.values())

    def close(self) -> None:
        """Close everything at once and remove the FIFOs' names."""
        if self._stdin is not None:
            self._stdin.close()
        for output in self._outputs.values():
            output.close()
        self._hang_up()
        if not self.terminal and self._prefix is not None:
            for name in STREAMS:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._prefix + name, dir_fd=self._directory)

    def _output(self, name: StreamName) -> Output:
        pipe = not self.terminal
        return Output(
            self._loop,
            take=lambda fd, size: self._log.take(name, fd, size, pipe=pipe),
            tap=lambda data: self._log.write(name, data),
            on_end=lambda: self._output_ended(name),
        )

    def _output_ended(self, name: StreamName) -> None:
        self._log.end(name)
        if self.ended:
            self._hang_up()
            self._on_end()

    def _hang_up(self) -> None:
        if self.console >= 0:
            os.close(self.console)
            self.console = -1

    def _open_pipes(self, inherited: list[int]) -> Stdio:
        if self._prefix is None:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            inherited.append(writer)
            self._outputs["stdout"].begin(reader, terminal=False)
            os.fchmod(writer, _ANYBODY)
            return Stdio(None, writer, writer)
        for name, output in self._outputs.items():
            reader, writer = self._open_fifo(self._prefix + name)
            inherited.append(writer)
            output.begin(reader, terminal=False)
        stdout, stderr = inherited
        if self._stdin is None:
            return Stdio(None, stdout, stderr)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        inherited.append(reader)
        os.fchmod(reader, _ANYBODY)
        _enlarge(reader)
        self._stdin.begin(writer, terminal=False)
        return Stdio(reader, stdout, stderr)

    def _open_fifo(self, name: str) -> tuple[int, int]:
        try:
            os.mkfifo(name, 0o600, dir_fd=self._directory)
        except FileExistsError:  # of a create that failed, or of a shim before this one
            os.unlink(name, dir_fd=self._directory)
            os.mkfifo(name, 0o600, dir_fd=self._directory)
        reader = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.fchmod(reader, _ANYBODY)
            _enlarge(reader)
            return reader, os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self._directory)
        except BaseException:
            os.close(reader)
            raise


def _enlarge(pipe: int) -> None:
    """Fewer, larger reads; a user who has many pipes already keeps the small one."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
