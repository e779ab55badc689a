"""A program of the host that gets a container's output: containerd's binary logging protocol.

    fd 3  the container's stdout     CONTAINER_ID, CONTAINER_NAMESPACE    all of its environment
    fd 4  the container's stderr     0, 1, 2                              /dev/null
    fd 5  closed by it, or written to, when it is ready

It is started once. It reads the end of both streams when the container has ended, and ends by itself; no container
waits for it. One that does not end is ended, by a process that does nothing else and needs no shim: any may be dead by
then. That attendant knows by a pipe of its own, whose writing end goes where those of the streams go:

    life      its reading end is the attendant's alone: without a reader nobody attends, without a writer all is over
    program   a pidfd of the program, for an heir who has to start another attendant

It holds none of the program's streams: who writes to one that the program has closed shall hear that at once.
Source: containerd, runtime/v2/README.md, "Logging"; pkg/process/io.go.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from corral.kernel import process
from corral.shim import report
from corral.shim.errors import ShimError
from corral.shim.outbox import Receiver
from corral.shim.spool import STREAMS, StreamName

READY_S = 10.0
_ENDED_S = 0.1
# From the end of both streams, to pass on what it has read.
END_S = 10.0
# From SIGTERM to SIGKILL.
TERM_S = 5.0
LIFE, PROGRAM = "life", "program"
_FIRST_FD = 3
_PROCESS_GROUP = 1 << 2
_UMASK = 0o022


class PipeReceiver:
    """The writing end of a pipe, owned; -1 for none. Once nobody reads it any more it is over."""

    returns = hears = False

    def __init__(self, fd: int) -> None:
        self._fd = fd
        if fd >= 0:
            os.set_blocking(fd, False)

    def connect(self) -> None:
        """There is nothing to connect to."""
        raise BrokenPipeError(errno.EPIPE, "the logging program has ended")

    def fileno(self) -> int:
        """-1 once it is over."""
        return self._fd

    def send(self, message: bytes) -> int:
        """As Receiver."""
        if self._fd < 0:
            self.connect()
        return os.write(self._fd, message)

    def close(self) -> None:
        """Let the reader read the end."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class Program:
    """One that runs: the pipes it reads, and what an attendant is started with, LIFE and PROGRAM. All are owned."""

    pipes: Mapping[StreamName, Receiver]
    attendance: Mapping[str, int]


def start(program: Sequence[str], env: Mapping[str, str], directory: int | None = None) -> Program:
    """Start it and wait until it is ready.

    directory: an fd of the bundle, for shim.log, which tells if it had to be ended.
    Raises ShimError if it cannot be executed, ends before it is ready, or is not ready within READY_S; OSError.
    """
    theirs: list[int] = []
    ours: list[int] = []
    given: list[int] = []
    try:
        for _ in STREAMS:
            _pipe(theirs, given)
        _pipe(ours, given)
        _pipe(ours, theirs)
        _pipe(ours, theirs)
        attended, ready, failed = ours
        pid, pidfd = process.clone(0)
        if pid == 0:
            _become(program, env, theirs[:-1], theirs[-1])
        given.append(pidfd)
        while theirs:
            os.close(theirs.pop())
        try:
            _await_ready(program[0], ready, failed, pidfd)
            _start_attendant(program[0], pidfd, attended, directory)
        except BaseException:
            process.send_signal(pidfd, 9)
            raise
        stdout, stderr, life, _ = given
        given.clear()
        return Program({"stdout": PipeReceiver(stdout), "stderr": PipeReceiver(stderr)}, {LIFE: life, PROGRAM: pidfd})
    finally:
        for fd in (*theirs, *ours, *given):
            os.close(fd)


def resumed(fds: Mapping[str, int], name: str, directory: int | None = None) -> Program:
    """One that was started by another shim, as far as its pipes were kept. Somebody attends to it from here on."""
    attendance = {each: fds[each] for each in (LIFE, PROGRAM) if each in fds}
    if len(attendance) == len((LIFE, PROGRAM)):
        with contextlib.suppress(OSError):  # a log that nobody will end is better than a container without a shim
            _attend_again(name, fds[PROGRAM], fds[LIFE], directory)
    return Program({stream: PipeReceiver(fds.get(stream, -1)) for stream in STREAMS}, attendance)


def _pipe(readers: list[int], writers: list[int]) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    readers.append(reader)
    writers.append(writer)


def _await_ready(name: str, ready: int, failed: int, pidfd: int) -> None:
    """Until it says so. Raises ShimError; the kernel's own reason is what came over `failed`."""
    reason = os.read(failed, 4096).decode("utf-8", "replace")
    if reason:
        raise _failed(name, f"cannot be executed: {reason}")
    if not _readable(ready, READY_S):
        raise _failed(name, f"is not ready within {READY_S:g} s: it has to close its descriptor 5")
    if not os.read(ready, 1) and _readable(pidfd, _ENDED_S):
        raise _failed(name, "has ended before it was ready")


def _attend_again(name: str, pidfd: int, life: int, directory: int | None) -> None:
    """Unless somebody does, or it has ended. It is the same pipe, which others may hold the writing end of."""
    if not _readable(life, 0, select.POLLERR) or _readable(pidfd, 0):
        return
    attended = os.open(f"/proc/self/fd/{life}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _start_attendant(name, pidfd, attended, directory)
    finally:
        os.close(attended)


def _start_attendant(name: str, pidfd: int, attended: int, directory: int | None) -> None:
    attendant, its_pidfd = process.clone(0)
    if attendant == 0:
        _attend(name, pidfd, attended, directory)
    os.close(its_pidfd)


def _attend(name: str, pidfd: int, attended: int, directory: int | None) -> NoReturn:
    """Wait until it has ended, or nobody can write to it any more, whichever shim that was; see the module."""
    try:
        process.lose_oom_protection()
        process.close_fds((attended, pidfd, *(() if directory is None else (directory,))))
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(attended, 0)  # POLLHUP: there is no writer
        if pidfd in dict(poller.poll()):
            os._exit(0)
        for seconds, number in ((END_S, signal.SIGTERM), (TERM_S, signal.SIGKILL)):
            if _readable(pidfd, seconds):
                os._exit(0)
            if directory is not None:
                report.write(directory, f"the logging program {name} does not end: {number.name}")
            _signal(pidfd, number)
    finally:
        os._exit(1)


def _signal(pidfd: int, number: signal.Signals) -> None:
    """Send it; SIGKILL to all of its process group, which it leads, where the kernel can do that by a pidfd (6.9)."""
    flags = _PROCESS_GROUP if number is signal.SIGKILL else 0
    try:
        signal.pidfd_send_signal(pidfd, number, None, flags)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        process.send_signal(pidfd, number)


def _failed(name: str, how: str) -> ShimError:
    return ShimError("failed_precondition", f"the logging program {name} {how}")


def _readable(fd: int, seconds: float, events: int = select.POLLIN) -> bool:
    poller = select.poll()
    poller.register(fd, events)
    until = time.monotonic() + seconds
    while not (found := poller.poll(max(0.0, until - time.monotonic()) * 1000)) and time.monotonic() < until:
        pass
    return bool(found)


def _become(program: Sequence[str], env: Mapping[str, str], fds: Sequence[int], failure: int) -> NoReturn:
    try:
        process.lose_oom_protection()
        process.reset_signals()
        os.setsid()
        os.chdir("/")
        os.umask(_UMASK)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (null, null, null, *fds)]
        failure = fcntl.fcntl(failure, fcntl.F_DUPFD_CLOEXEC, 40)
        for place, fd in enumerate(high):
            os.dup2(fd, place, inheritable=True)
        process.close_fds((*range(_FIRST_FD + len(fds)), failure))
        process.unblock_signals()
        os.execve(program[0], list(program), dict(env))  # noqa: S606 - that is what the driver is for
    except BaseException as e:  # noqa: BLE001 - a fork of the shim must not run on in its code
        reason = (e.strerror or str(e)) if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        os.write(failure, reason.encode("utf-8", "replace"))
    finally:
        os._exit(127)
