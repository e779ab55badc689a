"""What of a container is written down, to be found when its shim is no more, and what is done once it is over.

Where something can't be written, the shim's log says so, and life goes on.
"""

import contextlib
import os
import signal

from corral.kernel.process import send_signal, start_time
from corral.oci import hooks
from corral.oci.spec import Spec
from corral.oci.state import State
from corral.shim import records, report
from corral.shim.adoption import hold
from corral.shim.bundle import Bundle
from corral.shim.process import ContainerProcess


class Ledger:
    """The files of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._directory = bundle, bundle.directory
        self.created_at_ns = 0
        self.oom_uncounted: int | None = None
        self._own: tuple[int, int] | None = None  # this process's pid and start time

    def write_record(self, init: ContainerProcess) -> None:
        """Who looks after which init, and since when."""
        if self._own is None:
            self._own = os.getpid(), start_time("self")
        own_pid, own_start_time = self._own
        record = records.Record(
            shim_pid=own_pid,
            shim_start_time=own_start_time,
            init_pid=init.pid,
            init_start_time=init.start_time,
            created_at_ns=self.created_at_ns,
            started_at_ns=init.started_at_ns,
            terminal=init.io.terminal,
            oom_uncounted=self.oom_uncounted,
        )
        records.write_json(self._directory, records.RECORD, record.to_json(), step="shim.record", durable=False)

    def mark_starting(self) -> None:
        """Init is about to be told to become its program. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        os.close(os.open(records.STARTING, flags, 0o600, dir_fd=self._directory))

    def mark_unattended(self) -> None:
        """The container ended while nobody held its output, for who comes after this shim."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            os.close(os.open(records.UNATTENDED, flags, 0o600, dir_fd=self._directory))
        except OSError as e:
            report.write(self._directory, f"{records.UNATTENDED}: {e}")

    @property
    def is_unattended(self) -> bool:
        """Whether a shim before this one has found that."""
        return records.exists(self._directory, records.UNATTENDED)

    def write_exit(self, ended: records.Exit) -> None:
        """How a process ended: on disk before this returns if it is the container. An exec's is there
        for who comes after this process; a loss of power may take it, as it takes the exec."""
        is_exec = bool(ended.exec_id)
        name, step = records.exit_file(ended.exec_id), "shim.exec_exit" if is_exec else "shim.exit"
        try:
            records.write_json(self._directory, name, ended.to_json(), step=step, durable=not is_exec)
        except OSError as e:
            # The event still tells; without a disk there is nothing better.
            report.write(self._directory, f"{name}: {e}")

    def remove_exit(self, exec_id: str) -> None:
        """Nobody asks for it any more."""
        records.remove(self._directory, records.exit_file(exec_id))

    def note_run(self, run: ContainerProcess) -> None:
        """One that may outlive this shim: the execve of a program that gains privileges takes its PR_SET_PDEATHSIG."""
        try:
            (self._bundle.known() / records.RUNS).mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            os.close(os.open(_run_file(run), flags, 0o600, dir_fd=self._directory))
        except OSError as e:
            report.write(self._directory, f"{records.RUNS}: {e}")

    def forget_run(self, run: ContainerProcess) -> None:
        """It has ended."""
        records.remove(self._directory, _run_file(run))

    def end_runs(self) -> None:
        """Kill those that have outlived the shim before this one."""
        for file in (self._bundle.known() / records.RUNS).glob("*.*"):
            with contextlib.suppress(OSError, ValueError):
                pid, began = map(int, file.name.split("."))
                handle = hold(pid, began)
                if handle.pidfd >= 0:
                    try:
                        send_signal(handle.pidfd, signal.SIGKILL)
                    finally:
                        os.close(handle.pidfd)
                file.unlink()

    def run_poststop(self, spec: Spec) -> None:
        """The hooks of a container that is no more: nobody but the shim knows for sure when that is."""
        bundle = self._bundle.known()
        state = State(bundle.name, str(bundle), spec.annotations)
        for warning in hooks.run_poststop(spec.hooks, state):
            report.write(self._directory, warning)


def _run_file(run: ContainerProcess) -> str:
    return f"{records.RUNS}/{run.pid}.{run.start_time}"
