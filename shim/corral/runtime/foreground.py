"""Staying with a process until it ends: signals go on to it, its terminal is ours, its exit code too."""

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

from corral.kernel import process, signalfd

if TYPE_CHECKING:
    from corral.oci.attendance import ProcessHandle
    from corral.runtime.terminal import Joined

_OURS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
_NOT_PASSED_ON = (signal.SIGCHLD, signal.SIGURG, signal.SIGPIPE, signal.SIGWINCH)
_DRAIN_S = 1.0


def hold_signals() -> int:
    """Block what is to be passed on, from before the process exists; returns the signalfd."""
    return signalfd.open_signalfd(set(signal.valid_signals()) - set(_OURS))


def stay(handle: "ProcessHandle", signals: int) -> int:
    """Until the process has ended: its exit code, 128 + N if signal N ended it. Reaps every child meanwhile."""
    poller = select.poll()
    poller.register(signals, select.POLLIN)
    poller.register(handle.pidfd, select.POLLIN)
    with _joined(handle, poller) as terminal:
        while True:
            for fd, _ in poller.poll():
                if fd == signals:
                    for number in signalfd.read_signals(signals):
                        _on_signal(number, handle, terminal)
                elif fd == handle.pidfd:
                    return _end(handle, terminal)
                elif terminal is not None:
                    terminal.handle(fd)


@contextlib.contextmanager
def _joined(handle: "ProcessHandle", poller: "select.poll") -> "Iterator[Joined | None]":
    if handle.console is None:
        yield None
        return
    from corral.runtime.terminal import Joined, raw

    with raw():
        yield Joined(handle.console, poller)


def _on_signal(number: int, handle: "ProcessHandle", terminal: "Joined | None") -> None:
    if number == signal.SIGCHLD:
        _reap_others(handle.pid)
    elif number == signal.SIGWINCH and terminal is not None:
        terminal.resize()
    elif number not in _NOT_PASSED_ON:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(handle.pidfd, number)


def _reap_others(init: int) -> None:
    """What the container left to this process, which stands in for its reaper."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == init:
            return
        os.waitpid(ended.si_pid, 0)


def _end(handle: "ProcessHandle", terminal: "Joined | None") -> int:
    while terminal is not None and terminal.copy_output():
        pass
    ended = os.waitid(os.P_PIDFD, handle.pidfd, os.WEXITED)
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
