"""Processes that another shim made, which was killed: their end, seen by who is not their parent.

    pidfd readable --> exit.json, by the zygote | PIDFD_GET_INFO (Linux >= 6.15) | /proc/PID/stat of a zombie | unknown

Whoever inherited the process reaps it, and only then does the kernel tell others how it ended.
"""

import contextlib
import os
import select
import time
from collections.abc import Callable

from corral.kernel import capabilities, process
from corral.oci.runtime import ProcessHandle
from corral.shim import records
from corral.shim.loop import IN, Loop
from corral.shim.process import Ended

REAPED_S = 1.0
ASK_S = 0.005


def runs(handle: ProcessHandle) -> bool:
    """Whether a process has not ended."""
    if handle.pidfd < 0:
        return False
    poll = select.poll()
    poll.register(handle.pidfd, select.POLLIN)
    return not poll.poll(0)


def hold(pid: int, start_time: int, pidfd: int = -1) -> ProcessHandle:
    """The process that began at start_time; one that is gone has a pidfd of -1. A pidfd of it, if there is one, is
    owned from here on."""
    if pidfd >= 0:
        return ProcessHandle(pid, pidfd, start_time, None)
    gone = ProcessHandle(pid, -1, start_time, None)
    try:
        pidfd = process.pidfd_open(pid)
    except ProcessLookupError:
        return gone
    try:
        if process.start_time(pid) == start_time:
            return ProcessHandle(pid, pidfd, start_time, None)
    except (FileNotFoundError, ProcessLookupError):
        pass
    os.close(pidfd)
    return gone


class EndWatch:
    """Calls on_end once, when the process has ended."""

    __slots__ = ("_give_up_at", "_handle", "_loop", "_on_end", "_written")

    def __init__(
        self,
        loop: Loop,
        handle: ProcessHandle,
        *,
        written: Callable[[], Ended | None],
        on_end: Callable[[Ended], None],
    ) -> None:
        """written: what somebody else has written down about the end."""
        self._loop, self._handle, self._written, self._on_end = loop, handle, written, on_end
        self._give_up_at = 0.0
        if handle.pidfd < 0:
            self._begin_asking()
        else:
            loop.watch(handle.pidfd, IN, lambda _events: self._begin_asking())

    def _begin_asking(self) -> None:
        if self._handle.pidfd >= 0:
            self._loop.forget(self._handle.pidfd)
        self._give_up_at = time.monotonic() + REAPED_S
        self._loop.call_later(0, self._ask)

    def _ask(self) -> None:
        at_ns = time.time_ns()
        ended = self._written()  # with the time of the end, which may be long ago
        if ended is None and (status := self._told()) is not None:
            ended = Ended(status, at_ns)
        if ended is not None:
            self._on_end(ended)
        elif time.monotonic() < self._give_up_at:
            self._loop.call_later(ASK_S, self._ask)
        else:
            self._on_end(Ended(_of_zombie(self._handle), at_ns))

    def _told(self) -> int | None:
        with contextlib.suppress(OSError):
            return process.pidfd_info(self._handle.pidfd).exit_status if self._handle.pidfd >= 0 else None
        return None


def _of_zombie(handle: ProcessHandle) -> int | None:
    """The status of a process that nobody reaps; /proc tells 0 to who may not know it."""
    if not capabilities.effective() >> capabilities.SYS_PTRACE & 1:
        return None
    with contextlib.suppress(OSError):
        return process.zombie_status(handle.pid, handle.start_time)
    return None


def written_exit(directory: int, exec_id: str = "") -> Ended | None:
    """What the bundle (an fd) tells of how a process ended, which the zygote writes for a shim that was killed."""
    with contextlib.suppress(OSError, ValueError):
        content = records.read_json(directory, records.exit_file(exec_id))
        code, number, at_ns = (content.get(name) for name in ("code", "signal", "exited_at_ns"))
        if content.get("known") is not False and isinstance(code, int) and isinstance(at_ns, int):
            return Ended(number if isinstance(number, int) else (code & 0xFF) << 8, at_ns)
    return None
