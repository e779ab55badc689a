"""One container, from create, or from the death of the shim before this one, to its end.

    create --> start --> exit of init, told --> execs end --> clients have their bytes --> poststop hooks --> end
    adopt ------^

What is told at an exit, and when, is in corral.shim.processes; nobody above is needed for any of it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from corral.kernel.failpoint import failpoint
from corral.kernel.namespaces import Kind, open_namespace
from corral.kernel.process import is_dying, start_time
from corral.oci import plan, runtime
from corral.oci.errors import ExecFailed
from corral.oci.larder import Larder
from corral.oci.program import warnings_of
from corral.oci.runtime import Container, ProcessHandle
from corral.oci.secret_files import SecretFiles
from corral.oci.usual import spec_of
from corral.shim import midwife, records, report
from corral.shim.adoption import EndWatch, hold, runs, written_exit
from corral.shim.bundle import Bundle
from corral.shim.config import read_spec
from corral.shim.errors import ShimError
from corral.shim.execs import Execs
from corral.shim.keeping import Keeper
from corral.shim.ledger import Ledger
from corral.shim.leftovers import kill_leftovers
from corral.shim.log_drivers import open_log
from corral.shim.logs import Log, NoLog
from corral.shim.loop import Loop
from corral.shim.midwife import Midwife
from corral.shim.oom import OomCounter
from corral.shim.process import ContainerProcess, StartFailure, State
from corral.shim.processes import DRAIN_S, Processes, not_created
from corral.shim.requests import LOG_PREFIX, PIDFD, STREAM_NAMES, Adopt, Attach, Create
from corral.shim.wire import Message, close_all

STUCK_S = 5.0
END_CHECK_S = 0.01


class Shim:
    """The container of one bundle. Requests fail with ShimError, OSError, ValueError or ExecFailed."""

    def __init__(
        self,
        loop: Loop,
        bundle: Bundle,
        *,
        publish: Callable[[Message], None],
        on_end: Callable[[], None],
        larder: Larder | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        """bundle: given before any request, or later. publish sends an event to every subscriber; on_end is called once
        nothing is left to do but to tell them.

        larder: mounts made ahead; keeper: who holds streams, too; both owned from here on.
        """
        self.keeper = keeper or Keeper()
        self._larder = larder or Larder()
        self._midwife: Midwife | None = None
        self.loop, self.bundle, self._publish, self._on_end = loop, bundle, publish, on_end
        self._directory = bundle.directory
        self._ledger = Ledger(bundle)
        self.processes = Processes(
            loop, self._directory, self._ledger, self.keeper, publish=publish, on_init_end=self._init_finished
        )
        self.execs = Execs(bundle, self.processes, self._ledger, self.keeper, running=self._running)
        self._container: Container | None = None
        self._mounts: int | None = None
        self._wait_until = 0.0
        self._timeout_ns = 0

    @property
    def state(self) -> State:
        """The container's state: that of its own process."""
        init = self.processes.get("")
        return init.state if init else State.NEW

    def close(self) -> None:
        """Release what is held of a container that has ended or never was."""
        for process in self.processes:
            process.io.close()
            process.release()
        if self.processes.oom is not None:
            self.processes.oom.close()
        self.keeper.close()
        self._let_mounts_go()
        self._larder.close()
        self._let_midwife_go()

    def _let_midwife_go(self) -> None:
        if self._midwife is not None:
            self._midwife.dismiss()
            self._midwife = None

    # Create, start.

    def stand_by(self) -> None:
        """There is time until create()."""
        self._midwife = midwife.fork(self._larder)
        if self._midwife is not None:
            self._larder.close()

    def expect(self, message: Message) -> None:
        """create() is next, by this message: who has a part in it may begin.

        Not where there are secrets: the tmpfs that they lie in would be charged to the midwife's cgroup.
        """
        if message.get("secrets"):
            self._let_midwife_go()
        elif self._midwife is not None:
            self._midwife.order(message, self.bundle.known())

    def create(self, request: Create) -> Message:
        """Make the container up to where only start is missing. After an error all is undone; it may be tried again."""
        if self.state is not State.NEW:
            raise ShimError("already_exists", "the container is already created")
        spec = read_spec(request, self._directory)
        program = spec.process
        assert program is not None
        log: Log = NoLog()
        warnings: list[str] = []
        io = self.processes.io("", log, terminal=program.terminal, stdin=request.stdin)

        def meanwhile() -> None:
            nonlocal log
            log = open_log(self.loop, request.log, directory=self._directory)
            io.log_to(log)
            warnings.extend(warnings_of(program))

        try:
            with io.child_ends() as stdio:
                failpoint("shim.create.before_clone")
                container = runtime.create(
                    spec,
                    bundle=self.bundle.known(),
                    rootfs=request.rootfs,
                    parts=request.parts,
                    user=request.user,
                    cgroup_paths=request.cgroup_paths,
                    stdio=stdio,
                    console_size=request.console_size,
                    larder=self._larder,
                    secrets=SecretFiles(request.secrets) if request.secrets else None,
                    images=request.images,
                    meanwhile=meanwhile,
                    midwife=self._midwife if runtime.needs_no_talk(spec) else None,
                )
        except BaseException as e:
            log.close()
            self._larder.close()
            if not isinstance(e, ValueError):  # then nothing was made
                self._ledger.run_poststop(spec)
            raise
        finally:
            self._let_midwife_go()
        failpoint("shim.create.after_clone")
        for warning in warnings:
            report.write(self._directory, warning)
        self.processes.log, self._container, self.processes.cgroup_paths = log, container, request.cgroup_paths
        self._timeout_ns = request.timeout_ns
        return self._created(ContainerProcess("", io, program), container)

    def _created(self, init: ContainerProcess, container: Container) -> Message:
        self._ledger.created_at_ns = time.time_ns()
        init.handle = container.init
        init.move(State.CREATED)
        self.processes.add(init)
        self.processes.born(init)
        init.io.begin(container.init.console)
        self.loop.call_later(0, self._begin_watching_oom)
        self._write_record_soon(init)
        self.loop.call_later(0, lambda: self._hold_mounts(init))
        self.loop.call_later(0, lambda: self.processes.have_kept(init))
        self.loop.call_later(0, self._larder.close)  # for what init did not take of it the kernel takes its time
        return {"pid": init.pid, "start_time": init.start_time}

    def start(self, exec_id: str) -> Message:
        """Run the program of the container, or of a registered exec."""
        process = self.processes.find(exec_id)
        if process.state is not State.CREATED:
            raise ShimError("failed_precondition", f"{process.what} was already started")
        if process.ended is not None:
            raise ShimError("failed_precondition", f"{process.what} has ended before it was started")
        if not exec_id:
            return self._start_init(process)
        reply = self.execs.start(process)
        self._publish(process.started_event())
        return reply

    def _start_init(self, init: ContainerProcess) -> Message:
        started_at_ns = time.time_ns()
        self._ledger.mark_starting()
        self._larder.close()  # if this came with the create: what is held here the program could not unmount
        failpoint("shim.start.before_exec")
        try:
            self._made().start()
        except ExecFailed as e:
            # init is dead; its exit is reported as any other, with this reason.
            init.failure = StartFailure.of(e)
            raise
        failpoint("shim.start.after_exec")
        init.started(started_at_ns)
        self._limit_time(init, self._timeout_ns)
        self._write_record_soon(init)
        self._publish(init.started_event())
        return {}

    def _limit_time(self, process: ContainerProcess, timeout_ns: int) -> None:
        """Kill it once its time is over. What is left of that is told by the clock, as an heir can't know more."""
        if not timeout_ns or process.started_at_ns is None:
            return
        until_ns = process.started_at_ns + timeout_ns
        self.processes.end_after(process, max(0, until_ns - time.time_ns()) / 1e9, until_ns)

    def _made(self) -> Container:
        if self._container is None:
            raise not_created()
        return self._container

    def _running(self) -> Container:
        if self.state is not State.RUNNING or self.processes.find("").ended is not None:
            raise ShimError("failed_precondition", f"the container is not running, it is {self.state.value}")
        return self._made()

    # Taking over from a shim that was killed.

    def adopt(self, request: Adopt, take_fds: Callable[[int], Sequence[int]]) -> Message:
        """Look after a process that runs already, or has ended since. Its output goes on where the log ends."""
        streams = dict(zip(request.streams, take_fds(len(request.streams)), strict=True))
        close_all([streams.pop(name) for name in request.streams if name not in STREAM_NAMES])  # of a newer version
        fds = list(streams.values())
        of_log = {name: streams.pop(name) for name in tuple(streams) if name.startswith(LOG_PREFIX)}
        handle = hold(request.pid, request.start_time, streams.pop(PIDFD, -1))
        try:
            if request.exec_id:
                process = self.execs.adopted(request, handle, self._made())
            else:
                process = self._adopt_init(request, handle, of_log)
            process.is_child = False
            process.move(State.CREATED)
            process.started(request.started_at_ns)
            self.processes.add(process)
        except BaseException:
            close_all([*fds, handle.pidfd])
            raise
        process.io.resume(streams)
        process.was_unattended = self._was_unattended(request, handle)
        self.processes.have_kept(process)
        if request.exec_id:
            self.keeper.began(request.exec_id, handle, request.started_at_ns)
        if not request.exec_id:
            self._timeout_ns = request.timeout_ns
            self._limit_time(process, request.timeout_ns)
            self._ledger.write_record(process)  # from here on nobody else has to hold what is resumed
        EndWatch(
            self.loop,
            handle,
            written=lambda: written_exit(self._directory, request.exec_id),
            on_end=lambda ended: self.processes.ended(process, ended),
        )
        failpoint("shim.adopt.before_reply")
        return {"pid": process.pid, "start_time": process.start_time}

    def _was_unattended(self, request: Adopt, handle: ProcessHandle) -> bool:
        """Whether it ended while nobody held its output; to be asked when this process does.

        Who is ending may have let go of that already, and is seen to run until all else of it is gone too.
        """
        unattended = request.unattended and (is_dying(handle.pid) or not runs(handle))
        if request.exec_id:
            return unattended
        if unattended:
            self._ledger.mark_unattended()
        return unattended or self._ledger.is_unattended

    def _adopt_init(self, request: Adopt, handle: ProcessHandle, of_log: Mapping[str, int]) -> ContainerProcess:
        if self.state is not State.NEW:
            raise ShimError("already_exists", "this shim has a container already")
        spec = spec_of(records.read_text(self._directory, "config.json"))
        if spec.process is None:
            raise ShimError("invalid_argument", "process: config.json has none")
        resumed = {name.removeprefix(LOG_PREFIX): fd for name, fd in of_log.items()}
        self.processes.log = open_log(self.loop, request.log, directory=self._directory, resumed=resumed)
        self.processes.cgroup_paths = request.cgroup_paths
        bundle = self.bundle.known()
        self._container = Container(spec, handle, None, bundle.name, str(bundle))
        io = self.processes.io("", self.processes.log, terminal=spec.process.terminal, stdin=request.stdin)
        init = ContainerProcess("", io, spec.process, handle=handle)
        self._ledger.created_at_ns = request.created_at_ns
        self._ledger.end_runs()
        self.processes.oom = self._watch_oom(self._oom_uncounted_before())
        self.loop.call_later(0, self.processes.oom.tell)  # what was killed while there was no shim is told now
        self._larder.close()
        self._let_midwife_go()
        self.loop.call_later(0, lambda: self._hold_mounts(init))
        return init

    def _oom_uncounted_before(self) -> int | None:
        """As the shim before has it in its record."""
        with contextlib.suppress(OSError, ValueError):
            return records.Record.from_json(records.read_json(self._directory, records.RECORD)).oom_uncounted
        return None

    def _hold_mounts(self, init: ContainerProcess) -> None:
        """Keep its mount namespace until its exit is told: the kernel tells us of that only once it has taken apart
        what is init's alone, which for a namespace with mounts takes milliseconds."""
        if init.ended is not None or init.handle is None or init.handle.pidfd < 0:
            return
        with contextlib.suppress(OSError):  # without it the exit is told a little later, and no more than that
            mounts = open_namespace(f"/proc/{init.pid}/ns/{Kind.MOUNT.file}")
            try:
                # Only now: one that this process has not made may have ended, and its pid be another's.
                if start_time(init.pid) == init.start_time:
                    self._mounts, mounts = mounts, -1
            finally:
                if mounts >= 0:
                    os.close(mounts)

    def _let_mounts_go(self) -> None:
        if self._mounts is not None:
            os.close(self._mounts)
            self._mounts = None

    def _write_record_soon(self, init: ContainerProcess) -> None:
        """Once the reply is out: should this process be killed before, init ends unstarted, by its channel; or it has
        a record that lacks no more than the time of the start."""
        self.loop.call_later(0, lambda: self._ledger.write_record(init))

    # While it lives.

    def attach(self, request: Attach, take_fds: Callable[[int], Sequence[int]]) -> Message:
        """Connect a client's descriptors to a process."""
        failpoint("shim.attach.before_connect")
        self.processes.find(request.exec_id).io.attach(request, take_fds(request.fd_count))
        failpoint("shim.attach.before_reply")
        return {}

    def close_stdin(self, exec_id: str) -> Message:
        """End the standard input of a process."""
        self.processes.find(exec_id).io.close_stdin()
        return {}

    def resize(self, exec_id: str, width: int, height: int) -> Message:
        """Set the size of a process's terminal."""
        self.processes.find(exec_id).io.resize(width, height)
        return {}

    def kill(self, exec_id: str, number: int, *, everyone: bool) -> Message:
        """Signal a process; or everyone: all processes of the container, execs and their children too."""
        process = self.processes.find(exec_id)
        process.signal(number)
        if everyone:
            for each in self.processes:
                each.was_sent_sigkill |= number == signal.SIGKILL
            kill_leftovers(self.processes.cgroup_paths, number, spare=process.pid)
        return {}

    def reopen_log(self) -> Message:
        """Open the log file again by its name."""
        self.processes.log.reopen()
        return {}

    def describe(self) -> Message:
        """The state of everything."""
        init = self.processes.get("")
        return {
            "state": self.state.value,
            "pid": init.pid if init else 0,
            "start_time": init.start_time if init else 0,
            "shim_pid": os.getpid(),
            "exit": init.exit.to_json() if init and init.exit else None,
            "execs": {
                process.exec_id: process.describe()
                for process in self.processes
                if process.exec_id and process.on_exit is None
            },
            "dropped_bytes": self.processes.log.dropped_bytes,
            "client_dropped_bytes": init.io.dropped_bytes if init else 0,
            "oom_kills": self.processes.oom.kills if self.processes.oom else 0,
        }

    def delete(self) -> bool:
        """Kill what is left. Whether nothing was: else on_end will be called."""
        init = self.processes.get("")
        if init is None:
            return True
        self.processes.kill_all()
        return False

    def _begin_watching_oom(self) -> None:
        """Once the reply to create is out: what init needs before its start it has."""
        self.processes.oom = self._watch_oom()

    def _watch_oom(self, uncounted: int | None = None) -> OomCounter:
        counter = OomCounter(
            self.loop,
            self.processes.cgroup_paths,
            on_kill=lambda kills: self._publish({"event": "oom", "exec": "", "oom_kills": kills}),
            report=lambda e: report.write(self._directory, f"OOM kills: {e}"),
            living=lambda: self.processes.living,
            uncounted=uncounted,
        )
        self._ledger.oom_uncounted = counter.uncounted
        return counter

    # The end.

    def _init_finished(self) -> None:
        """Execs of a private pid namespace are dead or dying already; otherwise they and their children end here."""
        self._let_mounts_go()
        self.processes.kill_all()
        if Kind.PID not in plan.created(self._made().spec):
            kill_leftovers(self.processes.cgroup_paths, signal.SIGKILL)
        self._wait_until = time.monotonic() + DRAIN_S
        self._check_end()

    def _check_end(self) -> None:
        """End once execs are reaped and clients have their bytes, or take none any more."""
        oom, log = self.processes.oom, self.processes.log
        left = any(p.alive for p in self.processes) or (oom is not None and oom.is_awaited)
        waiting = left and time.monotonic() < self._wait_until
        logged = log.delivered(STUCK_S)
        if waiting or not logged or not all(process.io.delivered(STUCK_S) for process in self.processes):
            self.loop.call_later(END_CHECK_S, self._check_end)
            return
        told = log.dropped_bytes
        log.close()
        if unsent := log.dropped_bytes - told:  # the exit is told already
            report.write(self._directory, f"log: {unsent} bytes were still waiting to be sent, and are dropped")
        self._ledger.run_poststop(self._made().spec)
        self._on_end()
