"""The processes of one container, its own (exec id "") and its execs: their streams, and the end of each.

The order at an exit is what the crash contract rests on:

    see the zombie --> take the rest of the output --> exit.json (fsync) --> reap --> tell subscribers

Nobody above is needed for any of it.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator

from corral.kernel.failpoint import failpoint
from corral.shim import records
from corral.shim.errors import ShimError
from corral.shim.keeping import Keeper
from corral.shim.ledger import Ledger
from corral.shim.leftovers import kill_offspring, let_die
from corral.shim.logs import Log, NoLog
from corral.shim.loop import Loop
from corral.shim.oom import OomCounter
from corral.shim.process import ContainerProcess, Ended, State
from corral.shim.requests import LOG_PREFIX, PIDFD, STDIN
from corral.shim.stdio import ProcessIO
from corral.shim.wire import Message

DRAIN_S = 2.0
STDIN_CLOSED = "stdin_closed"
"""The event that only those get who keep copies of streams."""


class Processes:
    """Found by exec id; watched until they have ended, and that is written down and told.

    log, oom and cgroup_paths are the container's, and set once there is one.
    """

    def __init__(
        self,
        loop: Loop,
        directory: int,
        ledger: Ledger,
        keeper: Keeper,
        *,
        publish: Callable[[Message], None],
        on_init_end: Callable[[], None],
    ) -> None:
        """directory: an fd of the bundle. publish sends an event to every subscriber; on_init_end is called once the
        end of the container's own process was told."""
        self._loop, self._directory, self._ledger, self._keeper = loop, directory, ledger, keeper
        self._publish, self._on_init_end = publish, on_init_end
        self._by_id: dict[str, ContainerProcess] = {}
        self._by_pid: dict[int, ContainerProcess] = {}
        self.log: Log = NoLog()
        self.oom: OomCounter | None = None
        self.cgroup_paths: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ContainerProcess]:
        return iter(self._by_id.values())

    def get(self, exec_id: str) -> ContainerProcess | None:
        """The process, or None."""
        return self._by_id.get(exec_id)

    def find(self, exec_id: str) -> ContainerProcess:
        """Raises ShimError."""
        process = self._by_id.get(exec_id)
        if process is None:
            raise ShimError("not_found", f"exec {exec_id!r} does not exist") if exec_id else not_created()
        return process

    def add(self, process: ContainerProcess) -> None:
        """It is found from now on."""
        self._by_id[process.exec_id] = process

    def remove(self, exec_id: str) -> None:
        """It is no more."""
        del self._by_id[exec_id]

    def born(self, process: ContainerProcess) -> None:
        """It is a child of this process, with a pid: reap() sees its end."""
        self._by_pid[process.pid] = process

    @property
    def living(self) -> list[int]:
        """The pids of init, first, and of execs; none once init has ended."""
        init = self._by_id.get("")
        if init is None or not init.alive:
            return []
        return [init.pid, *(each.pid for each in self if each.alive and each is not init)]

    # Their streams.

    def io(self, exec_id: str, log: Log, *, terminal: bool, stdin: bool, named: bool = True) -> ProcessIO:
        """Those of a process that is to be made or adopted; named: as FIFOs."""
        prefix = f"{records.EXECS}/{exec_id}." if exec_id else ""
        return ProcessIO(
            self._loop,
            log,
            terminal=terminal,
            stdin=stdin,
            directory=self._directory,
            prefix=prefix if named else None,
            on_end=lambda: self._output_ended(exec_id),
            on_stdin_close=lambda: self._stdin_closed(exec_id),
        )

    def streams(self, exec_id: str) -> dict[str, int]:
        """What another process may keep for the one that adopts; the fds stay this one's."""
        process = self.find(exec_id)
        streams = process.io.streams()
        if process.handle is not None and process.handle.pidfd >= 0:
            streams[PIDFD] = process.handle.pidfd
        return streams if exec_id else streams | {f"{LOG_PREFIX}{name}": fd for name, fd in self.log.streams().items()}

    def have_kept(self, process: ContainerProcess) -> None:
        """Copies of its streams. How one ends that this shim has made the zygote sees itself: it inherits it."""
        streams = self.streams(process.exec_id)
        if process.is_child:
            streams.pop(PIDFD, None)
        self._keeper.keep(process.exec_id, streams)

    def _stdin_closed(self, exec_id: str) -> None:
        """Whoever keeps a copy of its writing end must close that: only then it reads as ended."""
        self._keeper.drop(exec_id, STDIN)
        process = self._by_id.get(exec_id)
        if process is not None and process.ended is None:
            self._publish({"event": STDIN_CLOSED, "exec": exec_id})

    # The end.

    def end_after(self, process: ContainerProcess, seconds: float, until_ns: int | None = None) -> None:
        """Kill it then; told is that its time was over at until_ns, or else by then."""

        def time_is_over() -> None:
            process.overdue_since_ns = time.time_ns() if until_ns is None else until_ns
            failpoint("shim.timeout.before_kill")
            self.end(process)

        process.deadline = self._loop.call_later(seconds, time_is_over)

    def end(self, process: ContainerProcess) -> None:
        """Kill it, also where it is frozen by cgroup v1; of a run all that it has made, too."""
        is_run = process.on_exit is not None and process.alive
        if is_run:  # those first that are known by their parent alone
            kill_offspring(process.pid, self.cgroup_paths)
        process.end()
        if is_run:
            kill_offspring(process.pid, self.cgroup_paths)
        if not process.exec_id:
            let_die(self.cgroup_paths)

    def kill_all(self) -> None:
        """All that live."""
        for process in self:
            process.end()

    def reap(self) -> None:
        """Collect every child that has ended: init, execs, and orphans of theirs."""
        while True:
            try:
                # Looked at only: should this process be killed now, its heir finds a zombie and reads the same status.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            failpoint("shim.exit.seen")
            process = self._by_pid.pop(info.si_pid, None)
            if process is None:
                os.waitpid(info.si_pid, 0)
            else:
                self.ended(process, Ended.from_waitid(info, time.time_ns()))

    def ended(self, process: ContainerProcess, ended: Ended) -> None:
        """The kernel, or who reaped it, has told its end."""
        process.ended = ended
        if self.oom is not None and process.exec_id and ended.signal == signal.SIGKILL:
            process.was_out_of_memory = not process.was_sent_sigkill and self.oom.claim(process.pid)
        process.io.process_exited()
        if process.io.ended:
            if process.exit is None:
                self._finish(process)
        else:
            # Somebody else holds its output open. Should this process die while it waits, the exit is known anyway.
            self._write_exit(process)
            patience_s = 0 if process.exec_id and process.is_overdue else DRAIN_S
            process.drain_timer = self._loop.call_later(patience_s, process.io.abandon)

    def _output_ended(self, exec_id: str) -> None:
        process = self._by_id.get(exec_id)
        if process is not None and process.ended is not None and process.exit is None:
            self._finish(process)

    def _finish(self, process: ContainerProcess) -> None:
        for timer in (process.drain_timer, process.deadline):
            if timer is not None:
                timer.cancel()
        process.exit = self._write_exit(process)
        process.move(State.STOPPED)
        process.release()
        if process.on_exit is not None:
            if not process.spec.no_new_privileges:
                self._ledger.forget_run(process)
            self.remove(process.exec_id)
            process.on_exit(process.exit)
            return
        failpoint("shim.exit.before_event")
        self._publish({"event": "exited", **process.exit.to_json()})
        failpoint("shim.exit.after_event")
        if process.exec_id:
            self._keeper.forget(process.exec_id)
        else:
            self._on_init_end()

    def _write_exit(self, process: ContainerProcess) -> records.Exit:
        is_init = not process.exec_id
        exit_record = process.exit_record(
            oom=self._ran_out_of_memory(process),
            dropped_bytes=self.log.dropped_bytes if is_init else 0,
        )
        if process.on_exit is None:
            self._ledger.write_exit(exit_record)
        process.reap()
        return exit_record

    def _ran_out_of_memory(self, process: ContainerProcess) -> bool:
        """Of the container, whether any process of it was killed for memory; of an exec, whether it was itself."""
        if self.oom is None:
            return False
        # v1 tells of an OOM before the kill, and not once more after it: by now it has been counted.
        return process.was_out_of_memory if process.exec_id else self.oom.count() > 0


def not_created() -> ShimError:
    """What to tell who asks something of a container before there is one."""
    return ShimError("failed_precondition", "the container is not created")
