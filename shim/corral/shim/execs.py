"""The execs of one container: further processes in it, made by its shim when somebody asks.

    add --> created --start--> born --> known --> runs --> ended --> stopped --delete--> gone
    run ---------------------> born --> known --> runs --> ended --> gone, and told to who asked alone

- add() registers one, so that clients can attach before its first byte; start() makes it. Or add() does it all.
- What of it only this shim has, and which process it is, its zygote knows before its program can run
  (corral.shim.keeping): a shim that is killed has an heir, to which all but runs go (adopted()). Until then it waits
  for its shim's word, and ends without it.
- Its end is that of any process (corral.shim.processes). It stays, for who asks how it ended, until delete().
- run() is for what is asked of a container time and again: it has no heir, and is killed with its shim. Only one that
  can gain privileges, which ends that, is in a file, for the heir to kill it. Whose time is over, or whose client is
  gone, is killed with all that it has made.
"""

import time
from collections.abc import Callable, Sequence

from corral.kernel.failpoint import failpoint
from corral.oci.errors import ExecFailed
from corral.oci.runtime import Container, ProcessHandle
from corral.oci.spec import Process
from corral.shim import records
from corral.shim.bundle import Bundle
from corral.shim.errors import ShimError
from corral.shim.excerpt import Excerpt
from corral.shim.keeping import Keeper
from corral.shim.ledger import Ledger
from corral.shim.logs import NoLog
from corral.shim.oom import with_ordinary_score
from corral.shim.process import ContainerProcess, State
from corral.shim.processes import Processes
from corral.shim.requests import CONSOLE, Adopt, Exec, Run
from corral.shim.stdio import ProcessIO
from corral.shim.wire import Message


class Execs:
    """Of the container of one bundle. Requests fail with ShimError, OSError, ValueError or ExecFailed."""

    def __init__(
        self,
        bundle: Bundle,
        processes: Processes,
        ledger: Ledger,
        keeper: Keeper,
        *,
        running: Callable[[], Container],
    ) -> None:
        """running: the container; raises ShimError if it does not run."""
        self._bundle, self._processes, self._ledger, self._keeper = bundle, processes, ledger, keeper
        self._running = running
        self._latest: tuple[object, Process] | None = None  # what was asked for last

    def add(self, request: Exec, take_fds: Callable[[int], Sequence[int]]) -> Message:
        """Register a process to be started later, so that clients can attach before its first byte; or do that all."""
        self._running()
        spec = self._spec_of(request)
        (self._bundle.known() / records.EXECS).mkdir(mode=0o700, exist_ok=True)
        io = self._processes.io(request.exec_id, NoLog(), terminal=spec.terminal, stdin=request.stdin)
        process = self._add(request, spec, io)
        if not request.start:
            return {}
        try:
            if request.attach is not None:
                io.attach(request.attach, take_fds(request.attach.fd_count))
            return self.start(process)
        except BaseException:
            self._processes.remove(request.exec_id)
            io.close()
            raise

    def start(self, process: ContainerProcess) -> Message:
        """Make one that was registered."""
        self._make(process)
        failpoint("shim.exec.before_reply")
        return {"pid": process.pid, "start_time": process.start_time}

    def run(self, request: Run, tell: Callable[[Message], None]) -> None:
        """Run a process and tell once it has ended. No heir gets it: it is killed with this shim."""
        spec = self._spec_of(request)
        if spec.terminal:
            raise ShimError("invalid_argument", "process.terminal: nobody would be there to use it")
        excerpt = Excerpt(request.output_bytes)
        io = self._processes.io(request.exec_id, excerpt, terminal=False, stdin=False, named=False)
        process = self._add(request, spec, io)
        process.on_exit = lambda how: tell({**how.to_json(), "output": excerpt.text})
        try:
            self._make(process)
        except BaseException:
            self._processes.remove(request.exec_id)
            raise
        if request.timeout_ns:
            self._processes.end_after(process, request.timeout_ns / 1e9)

    def end_run(self, exec_id: str) -> None:
        """Whoever asked for it is gone."""
        process = self._processes.get(exec_id)
        if process is not None and process.on_exit is not None:
            self._processes.end(process)

    def adopted(self, request: Adopt, handle: ProcessHandle, container: Container) -> ContainerProcess:
        """One that another shim has made, which was killed; its container may have ended since."""
        spec = container.spec.process
        assert spec is not None
        if self._processes.get(request.exec_id) is not None:
            raise _exists(request.exec_id)
        io = self._processes.io(request.exec_id, NoLog(), terminal=request.terminal, stdin=request.stdin)
        return ContainerProcess(request.exec_id, io, spec, handle=handle)

    def delete(self, exec_id: str) -> Message:
        """Forget one that has ended or never ran, and its exit file."""
        process = self._processes.find(exec_id)
        if not exec_id:
            raise ShimError("invalid_argument", "exec: missing")
        if process.state is State.RUNNING:
            raise ShimError("failed_precondition", f"{process.what} is running")
        process.io.close()
        process.release()
        self._ledger.remove_exit(exec_id)
        self._processes.remove(exec_id)
        return {}

    def _spec_of(self, request: Exec | Run) -> Process:
        """Read once, where the same is asked for time and again."""
        if self._latest is None or self._latest[0] != request.process:
            self._latest = request.process, with_ordinary_score(Process.from_json(request.process))
        return self._latest[1]

    def _add(self, request: Exec | Run, spec: Process, io: ProcessIO) -> ContainerProcess:
        self._running()
        if self._processes.get(request.exec_id) is not None:
            raise _exists(request.exec_id)
        process = ContainerProcess(request.exec_id, io, spec, request.user)
        process.move(State.CREATED)
        self._processes.add(process)
        return process

    def _make(self, process: ContainerProcess) -> None:
        container = self._running()
        is_kept = process.on_exit is None
        started_at_ns = time.time_ns()

        def before_start(handle: ProcessHandle) -> None:
            self._forget(process)  # one that was tried before
            process.handle = handle
            self._have_known(process, handle, started_at_ns)

        try:
            with process.io.child_ends() as stdio:
                failpoint("shim.exec.before_clone")
                if is_kept:
                    self._processes.have_kept(process)
                process.handle = container.exec(
                    process.spec,
                    user=process.user,
                    stdio=stdio,
                    cgroup_paths=self._processes.cgroup_paths,
                    dies_with_runtime=not is_kept,
                    before_start=before_start,
                )
        except BaseException as e:
            self._forget(process)
            if isinstance(e, ExecFailed | OSError):
                process.move(State.STOPPED)
                if is_kept:
                    self._keeper.forget(process.exec_id)
            raise
        failpoint("shim.exec.after_clone")
        self._processes.born(process)
        process.started(started_at_ns)
        process.io.begin(process.handle.console)

    def _have_known(self, process: ContainerProcess, handle: ProcessHandle, at_ns: int) -> None:
        """What has to outlive this process, or else has to end with it, though the kernel may not see to that."""
        if process.on_exit is None:
            if handle.console is not None:
                self._keeper.keep(process.exec_id, {CONSOLE: handle.console})
            self._keeper.began(process.exec_id, handle, at_ns)
        elif not process.spec.no_new_privileges:
            self._ledger.note_run(process)
        failpoint("shim.exec.before_start")

    def _forget(self, process: ContainerProcess) -> None:
        """A process that was made for it has not become its program."""
        if process.handle is not None and process.on_exit is not None and not process.spec.no_new_privileges:
            self._ledger.forget_run(process)
        process.handle = None


def _exists(exec_id: str) -> ShimError:
    return ShimError("already_exists", f"exec {exec_id!r} already exists")
