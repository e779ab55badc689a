"""A process of the container, its own or an exec's: its state, its streams, its end.

new --> created --> running --> stopped
           |                       ^
           '-----------------------'   killed, or its program could not be executed
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from signal import SIGKILL
from typing import Self

from corral.kernel import process as kernel_process
from corral.oci.errors import EXEC_DENIED, EXEC_NOT_FOUND, ExecFailed
from corral.oci.runtime import ProcessHandle
from corral.oci.spec import Process
from corral.shim.errors import ShimError
from corral.shim.loop import Timer
from corral.shim.records import Exit
from corral.shim.stdio import ProcessIO


class State(Enum):
    """Where a process is in its life; the values are those of the wire."""

    NEW = "new"
    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"


ALLOWED = {
    State.NEW: {State.CREATED},
    State.CREATED: {State.RUNNING, State.STOPPED},
    State.RUNNING: {State.STOPPED},
    State.STOPPED: set(),
}


_FAILURE_CODES = {EXEC_NOT_FOUND: 127, EXEC_DENIED: 126}
_OTHER_FAILURE = 128
UNKNOWN = 255
"""The code of an end that nobody has seen."""
UNATTENDED = "it ended while nothing looked after it: what it wrote last may be missing"
UNSEEN = "its shim was killed, and nobody saw how it ended; exit code unknown"


@dataclass(frozen=True, slots=True)
class Ended:
    """What the kernel told about the end of a process: a wait(2) status and when it was read; None: it told nobody."""

    status: int | None
    at_ns: int

    @classmethod
    def from_waitid(cls, info: os.waitid_result, at_ns: int) -> Self:
        """From what waitid(2) says of a child that ended."""
        if info.si_code == os.CLD_EXITED:
            return cls(info.si_status << 8, at_ns)
        return cls(info.si_status, at_ns)

    @property
    def signal(self) -> int | None:
        """The signal that ended it."""
        return None if self.status is None or not os.WIFSIGNALED(self.status) else os.WTERMSIG(self.status)

    @property
    def code(self) -> int:
        """As a shell reports it, 255 if it is not known."""
        if self.status is None:
            return UNKNOWN
        return 128 + os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else os.WEXITSTATUS(self.status)


@dataclass(frozen=True, slots=True)
class StartFailure:
    """The program was never executed: what to report as its end."""

    code: int
    reason: str

    @classmethod
    def of(cls, error: ExecFailed) -> Self:
        """With the exit code that docker reports for it."""
        return cls(_FAILURE_CODES.get(error.kind, _OTHER_FAILURE), error.message)


@dataclass(slots=True, eq=False)
class ContainerProcess:
    """One process; `exec_id` is "" for the container's own."""

    exec_id: str
    io: ProcessIO
    spec: Process
    user: str | None = None
    state: State = State.NEW
    handle: ProcessHandle | None = None
    started_at_ns: int | None = None
    failure: StartFailure | None = None
    ended: Ended | None = None
    exit: Exit | None = None
    on_exit: Callable[[Exit], None] | None = None
    """Who alone is told of its end, if it is no other's business; then it is in no file."""
    drain_timer: Timer | None = None
    deadline: Timer | None = None
    overdue_since_ns: int | None = None
    """When its time was over, once it is: a SIGKILL that ends it later was sent for that."""
    is_child: bool = True
    """Else another shim made it, and somebody else reaps it."""
    was_out_of_memory: bool = False
    """The OOM killer took it, and can have taken nobody else."""
    was_sent_sigkill: bool = False
    """By the shim, for whatever reason."""
    was_unattended: bool = False
    """It ended while nobody held its output."""
    _reaped: bool = False

    def move(self, state: State) -> None:
        """Change the state; any move that ALLOWED does not list is a bug."""
        if state not in ALLOWED[self.state]:
            raise AssertionError(f"process {self.exec_id!r}: {self.state.value} to {state.value}")
        self.state = state

    def started(self, at_ns: int) -> None:
        """Its program was executed."""
        self.started_at_ns = at_ns
        self.move(State.RUNNING)

    def started_event(self) -> dict[str, object]:
        """What subscribers are told of that."""
        return {
            "event": "started",
            "exec": self.exec_id,
            "pid": self.pid,
            "start_time": self.start_time,
            "started_at_ns": self.started_at_ns,
        }

    @property
    def what(self) -> str:
        """What to call it in a sentence."""
        return f"exec {self.exec_id!r}" if self.exec_id else "the container"

    @property
    def pid(self) -> int:
        """The pid as the host sees it, 0 before there is one."""
        return self.handle.pid if self.handle else 0

    @property
    def start_time(self) -> int:
        """With the pid, names the process for good."""
        return self.handle.start_time if self.handle else 0

    @property
    def is_overdue(self) -> bool:
        """Whether its time was over before its end."""
        return self.overdue_since_ns is not None

    @property
    def alive(self) -> bool:
        """Whether the process exists and has not been reaped."""
        return self.handle is not None and self.handle.pidfd >= 0 and self.ended is None

    def signal(self, number: int) -> None:
        """Send a signal. Raises ShimError: failed_precondition if the process is gone, invalid_argument."""
        if self.handle is None or not self.alive:
            raise ShimError("failed_precondition", f"{self.what} is not running")
        try:
            kernel_process.send_signal(self.handle.pidfd, number)
            self.was_sent_sigkill |= number == SIGKILL
        except ProcessLookupError as e:
            raise ShimError("failed_precondition", f"{self.what} is not running") from e
        except (ValueError, OverflowError) as e:
            raise ShimError("invalid_argument", f"signal: {number} is not a signal") from e

    def end(self) -> None:
        """Kill it. One that is gone is fine: who has reaped it need not be this process, which may be told later."""
        if self.alive:
            with suppress(ShimError):
                self.signal(SIGKILL)

    def exit_record(self, *, oom: bool, dropped_bytes: int) -> Exit:
        """How it ended, once it has."""
        if self.ended is None:
            raise AssertionError(f"process {self.exec_id!r} has not ended")
        failure = self.failure
        why = UNATTENDED if self.was_unattended else ""
        return Exit(
            exec_id=self.exec_id,
            code=failure.code if failure else self.ended.code,
            signal=None if failure else self.ended.signal,
            oom=oom,
            started_at_ns=self.started_at_ns,
            exited_at_ns=self.ended.at_ns,
            pid=self.pid,
            start_time=self.start_time,
            dropped_bytes=dropped_bytes,
            reason=failure.reason if failure else why if self.ended.status is not None else UNSEEN,
            known=failure is not None or self.ended.status is not None,
            timed_out=self._has_timed_out(self.ended),
        )

    def _has_timed_out(self, ended: Ended) -> bool:
        overdue = self.overdue_since_ns is not None and ended.at_ns >= self.overdue_since_ns
        return overdue and ended.signal == SIGKILL

    def reap(self) -> None:
        """Let the kernel forget the process; its end is known and on disk."""
        if self.is_child and not self._reaped:
            self._reaped = True
            os.waitpid(self.pid, 0)

    def describe(self) -> dict[str, object]:
        """What the state request tells about it."""
        return {
            "state": self.state.value,
            "pid": self.pid,
            "start_time": self.start_time,
            "exit": self.exit.to_json() if self.exit else None,
            "client_dropped_bytes": self.io.dropped_bytes,
        }

    def release(self) -> None:
        """Let go of the descriptors of a process that has ended or was never started."""
        if self.handle is not None and self.handle.pidfd >= 0:
            os.close(self.handle.pidfd)
            self.handle.pidfd = -1
