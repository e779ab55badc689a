"""One container: its processes from create to exit, and what of them must outlive this process.

The order at an exit is what the crash contract rests on:

    see the zombie --> take the rest of the output --> exit.json (fsync) --> reap --> tell subscribers
                   --> deliver to clients --> end

Nobody above is needed for any of it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from corral.kernel.failpoint import failpoint
from corral.kernel.namespaces import Kind, open_namespace
from corral.kernel.process import start_time
from corral.oci import plan, runtime
from corral.oci.errors import ExecFailed
from corral.oci.larder import Larder
from corral.oci.program import warnings_of
from corral.oci.runtime import Container, ProcessHandle
from corral.oci.secret_files import SecretFiles
from corral.oci.spec import Process, Spec
from corral.shim import records, report
from corral.shim.adoption import EndWatch, hold, runs, written_exit
from corral.shim.errors import ShimError
from corral.shim.excerpt import Excerpt
from corral.shim.keeping import Keeper
from corral.shim.ledger import Ledger
from corral.shim.leftovers import kill_leftovers, let_die
from corral.shim.log_drivers import open_log
from corral.shim.logs import Log, NoLog
from corral.shim.loop import Loop
from corral.shim.oom import OomCounter, with_ordinary_score
from corral.shim.process import ContainerProcess, Ended, StartFailure, State
from corral.shim.requests import LOG_PREFIX, PIDFD, STDIN, STREAM_NAMES, Adopt, Attach, Create, Exec, Run
from corral.shim.stdio import ProcessIO
from corral.shim.wire import Message, close_all

DRAIN_S = 2.0
STUCK_S = 5.0
END_CHECK_S = 0.01
STDIN_CLOSED = "stdin_closed"
"""The event that only those get who keep copies of streams."""


class Shim:
    """The container of one bundle. Requests fail with ShimError, OSError, ValueError or ExecFailed."""

    def __init__(
        self,
        loop: Loop,
        bundle: Path,
        *,
        publish: Callable[[Message], None],
        on_end: Callable[[], None],
        larder: Larder | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        """publish sends an event to every subscriber; on_end is called once nothing is left to do but to tell them.

        larder: mounts made ahead; keeper: who holds streams, too; both owned from here on.
        """
        self._keeper = keeper or Keeper()
        self._larder = larder or Larder()
        self.loop, self.bundle, self._publish, self._on_end = loop, bundle, publish, on_end
        self._directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._ledger = Ledger(bundle, self._directory)
        self._log: Log = NoLog()
        self._container: Container | None = None
        self._processes: dict[str, ContainerProcess] = {}
        self._by_pid: dict[int, ContainerProcess] = {}
        self._cgroup_paths: tuple[Path, ...] = ()
        self._oom: OomCounter | None = None
        self._mounts: int | None = None
        self._wait_until = 0.0
        self._timeout_ns = 0
        self._latest: tuple[object, Process] | None = None  # of execs, what was asked for last

    @property
    def state(self) -> State:
        """The container's state: that of its own process."""
        init = self._processes.get("")
        return init.state if init else State.NEW

    def close(self) -> None:
        """Release what is held of a container that has ended or never was."""
        for process in self._processes.values():
            process.io.close()
            process.release()
        if self._oom is not None:
            self._oom.close()
        self._keeper.close()
        self._let_mounts_go()
        self._larder.close()
        os.close(self._directory)

    # Create, start, exec.

    def create(self, request: Create) -> Message:
        """Make the container up to where only start is missing. After an error all is undone; it may be tried again."""
        if self.state is not State.NEW:
            raise ShimError("already_exists", "the container is already created")
        spec = Spec.from_json(records.read_json(self._directory, "config.json"))
        if spec.process is None:
            raise ShimError("invalid_argument", "process: config.json has none")
        program = with_ordinary_score(spec.process)
        program = replace(program, env=(*program.env, *request.secret_env))
        spec = replace(spec, process=program)
        log = open_log(self.loop, request.log, directory=self._directory)
        io = self._io("", log, terminal=program.terminal, stdin=request.stdin)
        try:
            with io.child_ends() as stdio:
                failpoint("shim.create.before_clone")
                container = runtime.create(
                    spec,
                    bundle=self.bundle,
                    rootfs=request.rootfs,
                    parts=request.parts,
                    user=request.user,
                    cgroup_paths=request.cgroup_paths,
                    stdio=stdio,
                    console_size=request.console_size,
                    larder=self._larder,
                    secrets=SecretFiles(request.secrets) if request.secrets else None,
                    images=request.images,
                )
        except BaseException as e:
            log.close()
            if not isinstance(e, ValueError):  # then nothing was made
                self._ledger.run_poststop(spec)
            raise
        finally:
            self._larder.close()
        failpoint("shim.create.after_clone")
        for warning in warnings_of(program):
            report.write(self._directory, warning)
        self._log, self._container, self._cgroup_paths = log, container, request.cgroup_paths
        self._timeout_ns = request.timeout_ns
        return self._created(ContainerProcess("", io, program), container)

    def _created(self, init: ContainerProcess, container: Container) -> Message:
        self._ledger.created_at_ns = time.time_ns()
        init.handle = container.init
        init.move(State.CREATED)
        self._processes[""] = self._by_pid[init.pid] = init
        init.io.begin(container.init.console)
        self.loop.call_later(0, self._begin_watching_oom)
        self._write_record_soon(init)
        self.loop.call_later(0, lambda: self._hold_mounts(init))
        self.loop.call_later(0, lambda: self._have_kept(init))
        return {"pid": init.pid, "start_time": init.start_time}

    def start(self, exec_id: str) -> Message:
        """Run the program of the container, or of a registered exec."""
        process = self._find(exec_id)
        if process.state is not State.CREATED:
            raise ShimError("failed_precondition", f"{process.what} was already started")
        if process.ended is not None:
            raise ShimError("failed_precondition", f"{process.what} has ended before it was started")
        if not exec_id:
            return self._start_init(process)
        reply = self._start_exec(process)
        self._publish(process.started_event())
        return reply

    def _start_init(self, init: ContainerProcess) -> Message:
        started_at_ns = time.time_ns()
        self._ledger.mark_starting()
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
        self._end_after(process, max(0, until_ns - time.time_ns()) / 1e9, until_ns)

    def _end_after(self, process: ContainerProcess, seconds: float, until_ns: int | None = None) -> None:
        """Kill it then; told is that its time was over at until_ns, or else by then."""

        def time_is_over() -> None:
            process.overdue_since_ns = time.time_ns() if until_ns is None else until_ns
            failpoint("shim.timeout.before_kill")
            if process.alive:
                process.signal(signal.SIGKILL)
                if not process.exec_id:
                    let_die(self._cgroup_paths)

        process.deadline = self.loop.call_later(seconds, time_is_over)

    def add_exec(self, request: Exec, take_fds: Callable[[int], Sequence[int]]) -> Message:
        """Register a process to be started later, so that clients can attach before its first byte; or do that all."""
        self._running()
        spec = self._spec_of(request)
        (self.bundle / records.EXECS).mkdir(mode=0o700, exist_ok=True)
        io = self._io(request.exec_id, NoLog(), terminal=spec.terminal, stdin=request.stdin)
        process = self._add(request, spec, io)
        if not request.start:
            return {}
        try:
            if request.attach is not None:
                io.attach(request.attach, take_fds(request.attach.fd_count))
            return self._start_exec(process)
        except BaseException:
            del self._processes[request.exec_id]
            io.close()
            raise

    def _spec_of(self, request: Exec | Run) -> Process:
        """Read once, where the same is asked for time and again."""
        if self._latest is None or self._latest[0] != request.process:
            self._latest = request.process, with_ordinary_score(Process.from_json(request.process))
        return self._latest[1]

    def _add(self, request: Exec | Run, spec: Process, io: ProcessIO) -> ContainerProcess:
        self._running()
        if request.exec_id in self._processes:
            raise ShimError("already_exists", f"exec {request.exec_id!r} already exists")
        process = ContainerProcess(request.exec_id, io, spec, request.user)
        process.move(State.CREATED)
        self._processes[request.exec_id] = process
        return process

    def run(self, request: Run, tell: Callable[[Message], None]) -> None:
        """Run a process and tell once it has ended. No heir gets it: it is killed with this shim."""
        spec = self._spec_of(request)
        if spec.terminal:
            raise ShimError("invalid_argument", "process.terminal: nobody would be there to use it")
        excerpt = Excerpt(request.output_bytes)
        process = self._add(request, spec, self._io(request.exec_id, excerpt, terminal=False, stdin=False, named=False))
        process.on_exit = lambda how: tell({**how.to_json(), "output": excerpt.text})
        try:
            self._exec(process)
        except BaseException:
            del self._processes[request.exec_id]
            raise
        if not spec.no_new_privileges:
            self._ledger.note_run(process)
        if request.timeout_ns:
            self._end_after(process, request.timeout_ns / 1e9)

    def end_run(self, exec_id: str) -> None:
        """Whoever asked for it is gone."""
        process = self._processes.get(exec_id)
        if process is not None and process.on_exit is not None and process.alive:
            process.signal(signal.SIGKILL)

    def _start_exec(self, process: ContainerProcess) -> Message:
        self._exec(process)
        failpoint("shim.exec.before_reply")
        return {"pid": process.pid, "start_time": process.start_time}

    def _have_kept(self, process: ContainerProcess) -> None:
        """Copies of its streams. How one ends that this shim has made the zygote sees itself: it inherits it."""
        streams = self.streams(process.exec_id)
        if process.is_child:
            streams.pop(PIDFD, None)
        self._keeper.keep(process.exec_id, streams)

    def _exec(self, process: ContainerProcess) -> None:
        """What has to outlive this process is kept before the program can run, or else before anybody is told of it:
        a terminal, and who it is."""
        container = self._running()
        is_kept = process.on_exit is None
        started_at_ns = time.time_ns()
        try:
            with process.io.child_ends() as stdio:
                failpoint("shim.exec.before_clone")
                if is_kept:
                    self._have_kept(process)
                process.handle = container.exec(
                    process.spec,
                    user=process.user,
                    stdio=stdio,
                    cgroup_paths=self._cgroup_paths,
                    dies_with_runtime=not is_kept,
                )
        except (ExecFailed, OSError):
            process.move(State.STOPPED)
            if is_kept:
                self._keeper.forget(process.exec_id)
            raise
        failpoint("shim.exec.after_clone")
        self._by_pid[process.pid] = process
        process.started(started_at_ns)
        process.io.begin(process.handle.console)
        if is_kept:
            if process.handle.console is not None:
                self._have_kept(process)
            self._keeper.began(process)

    def _made(self) -> Container:
        if self._container is None:
            raise _not_created()
        return self._container

    def _running(self) -> Container:
        if self.state is not State.RUNNING or self._processes[""].ended is not None:
            raise ShimError("failed_precondition", f"the container is not running, it is {self.state.value}")
        return self._made()

    def _find(self, exec_id: str) -> ContainerProcess:
        process = self._processes.get(exec_id)
        if process is None:
            raise ShimError("not_found", f"exec {exec_id!r} does not exist") if exec_id else _not_created()
        return process

    def _io(self, exec_id: str, log: Log, *, terminal: bool, stdin: bool, named: bool = True) -> ProcessIO:
        prefix = f"{records.EXECS}/{exec_id}." if exec_id else ""
        return ProcessIO(
            self.loop,
            log,
            terminal=terminal,
            stdin=stdin,
            directory=self._directory,
            prefix=prefix if named else None,
            on_end=lambda: self._output_ended(exec_id),
            on_stdin_close=lambda: self._stdin_closed(exec_id),
        )

    def _stdin_closed(self, exec_id: str) -> None:
        """Whoever keeps a copy of its writing end must close that: only then it reads as ended."""
        self._keeper.drop(exec_id, STDIN)
        process = self._processes.get(exec_id)
        if process is not None and process.ended is None:
            self._publish({"event": STDIN_CLOSED, "exec": exec_id})

    # Taking over from a shim that was killed.

    def adopt(self, request: Adopt, take_fds: Callable[[int], Sequence[int]]) -> Message:
        """Look after a process that runs already, or has ended since. Its output goes on where the log ends."""
        streams = dict(zip(request.streams, take_fds(len(request.streams)), strict=True))
        close_all([streams.pop(name) for name in request.streams if name not in STREAM_NAMES])  # of a newer version
        fds = list(streams.values())
        of_log = {name: streams.pop(name) for name in tuple(streams) if name.startswith(LOG_PREFIX)}
        handle = hold(request.pid, request.start_time, streams.pop(PIDFD, -1))
        try:
            process = (
                self._adopt_exec(request, handle) if request.exec_id else self._adopt_init(request, handle, of_log)
            )
            process.is_child = False
            process.move(State.CREATED)
            process.started(request.started_at_ns)
            self._processes[request.exec_id] = process
        except BaseException:
            close_all([*fds, handle.pidfd])
            raise
        process.io.resume(streams)
        process.was_unattended = self._was_unattended(request, handle)
        self._have_kept(process)
        if request.exec_id:
            self._keeper.began(process)
        if not request.exec_id:
            self._timeout_ns = request.timeout_ns
            self._limit_time(process, request.timeout_ns)
            self._ledger.write_record(process)  # from here on nobody else has to hold what is resumed
        EndWatch(
            self.loop,
            handle,
            written=lambda: written_exit(self._directory, request.exec_id),
            on_end=lambda ended: self._ended(process, ended),
        )
        return {"pid": process.pid, "start_time": process.start_time}

    def _was_unattended(self, request: Adopt, handle: ProcessHandle) -> bool:
        """Whether it ended while nobody held its output; to be asked when this process does."""
        unattended = request.unattended and not runs(handle)
        if request.exec_id:
            return unattended
        if unattended:
            self._ledger.mark_unattended()
        return unattended or self._ledger.is_unattended

    def _adopt_init(self, request: Adopt, handle: ProcessHandle, of_log: Mapping[str, int]) -> ContainerProcess:
        if self.state is not State.NEW:
            raise ShimError("already_exists", "this shim has a container already")
        spec = Spec.from_json(records.read_json(self._directory, "config.json"))
        if spec.process is None:
            raise ShimError("invalid_argument", "process: config.json has none")
        resumed = {name.removeprefix(LOG_PREFIX): fd for name, fd in of_log.items()}
        self._log = open_log(self.loop, request.log, directory=self._directory, resumed=resumed)
        self._cgroup_paths = request.cgroup_paths
        self._container = Container(spec, handle, None, self.bundle.name, str(self.bundle))
        io = self._io("", self._log, terminal=spec.process.terminal, stdin=request.stdin)
        init = ContainerProcess("", io, spec.process, handle=handle)
        self._ledger.created_at_ns = request.created_at_ns
        self._ledger.end_runs()
        self._oom = self._watch_oom(self._oom_uncounted_before())
        self.loop.call_later(0, self._oom.tell)  # what was killed while there was no shim is told now
        self._larder.close()
        self.loop.call_later(0, lambda: self._hold_mounts(init))
        return init

    def _oom_uncounted_before(self) -> int | None:
        """As the shim before has it in its record."""
        with contextlib.suppress(OSError, ValueError):
            return records.Record.from_json(records.read_json(self._directory, records.RECORD)).oom_uncounted
        return None

    def _adopt_exec(self, request: Adopt, handle: ProcessHandle) -> ContainerProcess:
        spec = self._made().spec.process
        assert spec is not None
        if request.exec_id in self._processes:
            raise ShimError("already_exists", f"exec {request.exec_id!r} already exists")
        io = self._io(request.exec_id, NoLog(), terminal=request.terminal, stdin=request.stdin)
        return ContainerProcess(request.exec_id, io, spec, handle=handle)

    def streams(self, exec_id: str) -> dict[str, int]:
        """What another process may keep for the one that adopts; the fds stay this one's."""
        process = self._find(exec_id)
        streams = process.io.streams()
        if process.handle is not None and process.handle.pidfd >= 0:
            streams[PIDFD] = process.handle.pidfd
        return streams if exec_id else streams | {f"{LOG_PREFIX}{name}": fd for name, fd in self._log.streams().items()}

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
        self._find(request.exec_id).io.attach(request, take_fds(request.fd_count))
        return {}

    def close_stdin(self, exec_id: str) -> Message:
        """End the standard input of a process."""
        self._find(exec_id).io.close_stdin()
        return {}

    def resize(self, exec_id: str, width: int, height: int) -> Message:
        """Set the size of a process's terminal."""
        self._find(exec_id).io.resize(width, height)
        return {}

    def kill(self, exec_id: str, number: int, *, everyone: bool) -> Message:
        """Signal a process; or everyone: all processes of the container, execs and their children too."""
        process = self._find(exec_id)
        process.signal(number)
        if everyone:
            for each in self._processes.values():
                each.was_sent_sigkill |= number == signal.SIGKILL
            kill_leftovers(self._cgroup_paths, number, spare=process.pid)
        return {}

    def reopen_log(self) -> Message:
        """Open the log file again by its name."""
        self._log.reopen()
        return {}

    def describe(self) -> Message:
        """The state of everything."""
        init = self._processes.get("")
        return {
            "state": self.state.value,
            "pid": init.pid if init else 0,
            "start_time": init.start_time if init else 0,
            "shim_pid": os.getpid(),
            "exit": init.exit.to_json() if init and init.exit else None,
            "execs": {
                exec_id: process.describe()
                for exec_id, process in self._processes.items()
                if exec_id and process.on_exit is None
            },
            "dropped_bytes": self._log.dropped_bytes,
            "client_dropped_bytes": init.io.dropped_bytes if init else 0,
            "oom_kills": self._oom.kills if self._oom else 0,
        }

    def delete_exec(self, exec_id: str) -> Message:
        """Forget an exec that has ended or never ran, and its exit file."""
        process = self._find(exec_id)
        if not exec_id:
            raise ShimError("invalid_argument", "exec: missing")
        if process.state is State.RUNNING:
            raise ShimError("failed_precondition", f"{process.what} is running")
        process.io.close()
        process.release()
        self._ledger.remove_exit(exec_id)
        del self._processes[exec_id]
        return {}

    def delete(self) -> bool:
        """Kill what is left. Whether nothing was: else on_end will be called."""
        init = self._processes.get("")
        if init is None:
            return True
        self._kill_all()
        return False

    def _begin_watching_oom(self) -> None:
        """Once the reply to create is out: what init needs before its start it has."""
        self._oom = self._watch_oom()

    def _watch_oom(self, uncounted: int | None = None) -> OomCounter:
        counter = OomCounter(
            self.loop,
            self._cgroup_paths,
            on_kill=lambda kills: self._publish({"event": "oom", "exec": "", "oom_kills": kills}),
            report=lambda e: report.write(self._directory, f"OOM kills: {e}"),
            living=self._living,
            uncounted=uncounted,
        )
        self._ledger.oom_uncounted = counter.uncounted
        return counter

    def _living(self) -> list[int]:
        """The pids of init, first, and of execs; none once init has ended."""
        init = self._processes.get("")
        if init is None or not init.alive:
            return []
        return [init.pid, *(each.pid for each in self._processes.values() if each.alive and each is not init)]

    # The end.

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
                self._ended(process, Ended.from_waitid(info, time.time_ns()))

    def _ended(self, process: ContainerProcess, ended: Ended) -> None:
        process.ended = ended
        if self._oom is not None and process.exec_id and ended.signal == signal.SIGKILL:
            process.was_out_of_memory = not process.was_sent_sigkill and self._oom.claim(process.pid)
        process.io.process_exited()
        if process.io.ended:
            if process.exit is None:
                self._finish(process)
        else:
            # Somebody else holds its output open. Should this process die while it waits, the exit is known anyway.
            self._write_exit(process)
            patience_s = 0 if process.exec_id and process.is_overdue else DRAIN_S
            process.drain_timer = self.loop.call_later(patience_s, process.io.abandon)

    def _output_ended(self, exec_id: str) -> None:
        process = self._processes.get(exec_id)
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
            del self._processes[process.exec_id]
            process.on_exit(process.exit)
            return
        failpoint("shim.exit.before_event")
        self._publish({"event": "exited", **process.exit.to_json()})
        failpoint("shim.exit.after_event")
        if process.exec_id:
            self._keeper.forget(process.exec_id)
        else:
            self._init_finished()

    def _write_exit(self, process: ContainerProcess) -> records.Exit:
        is_init = not process.exec_id
        exit_record = process.exit_record(
            oom=self._ran_out_of_memory(process),
            dropped_bytes=self._log.dropped_bytes if is_init else 0,
        )
        if process.on_exit is None:
            self._ledger.write_exit(exit_record)
        process.reap()
        return exit_record

    def _ran_out_of_memory(self, process: ContainerProcess) -> bool:
        """Of the container, whether any process of it was killed for memory; of an exec, whether it was itself."""
        if self._oom is None:
            return False
        # v1 tells of an OOM before the kill, and not once more after it: by now it has been counted.
        return process.was_out_of_memory if process.exec_id else self._oom.count() > 0

    def _init_finished(self) -> None:
        """Execs of a private pid namespace are dead or dying already; otherwise they and their children end here."""
        self._let_mounts_go()
        self._kill_all()
        if Kind.PID not in plan.created(self._made().spec):
            kill_leftovers(self._cgroup_paths, signal.SIGKILL)
        self._wait_until = time.monotonic() + DRAIN_S
        self._check_end()

    def _kill_all(self) -> None:
        for process in self._processes.values():
            if process.alive:
                process.signal(signal.SIGKILL)

    def _check_end(self) -> None:
        """End once execs are reaped and clients have their bytes, or take none any more."""
        left = any(p.alive for p in self._processes.values()) or (self._oom is not None and self._oom.is_awaited)
        waiting = left and time.monotonic() < self._wait_until
        logged = self._log.delivered(STUCK_S)
        if waiting or not logged or not all(process.io.delivered(STUCK_S) for process in self._processes.values()):
            self.loop.call_later(END_CHECK_S, self._check_end)
            return
        told = self._log.dropped_bytes
        self._log.close()
        if unsent := self._log.dropped_bytes - told:  # the exit is told already
            report.write(self._directory, f"log: {unsent} bytes were still waiting to be sent, and are dropped")
        self._ledger.run_poststop(self._made().spec)
        self._on_end()


def _not_created() -> ShimError:
    return ShimError("failed_precondition", "the container is not created")
