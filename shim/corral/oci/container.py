"""A container as the runtime sees it once its init exists: to be started, joined, or let go of."""

import contextlib
import errno
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corral.kernel import process
from corral.oci import gate as gates
from corral.oci.attendance import SETUP_S, ProcessHandle, await_exec
from corral.oci.channel import ChildError, EndedEarly, ParentEnd
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.reaper import ANNOTATION
from corral.oci.spec import Hooks, Process, Spec
from corral.oci.state import RUNNING, State
from corral.oci.stdio import Stdio
from corral.oci.users import Sighting

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.oci.join_calls import Files
    from corral.oci.program import Program

_NOT_RUNNING = "the container is not running"


@dataclass(slots=True)
class Container:
    """A container whose init exists."""

    spec: Spec
    init: ProcessHandle
    _channel: ParentEnd | None
    id: str = ""
    """What hooks and seccomp listeners are told it is called."""
    bundle: str = ""
    sightings: dict[object, Sighting] = field(default_factory=dict)
    """Of execs, by what was asked for (corral.oci.joining)."""
    files: "Files | None" = None
    latest: "tuple[object, Process, Program] | None" = None
    """Of execs the last one: as it was asked for, completed, and what that came to."""

    @property
    def state(self) -> State:
        """What it is, for hooks and seccomp listeners."""
        return State(self.id, self.bundle, self.spec.annotations)

    def start(self, before_hooks: Callable[[], None] = lambda: None) -> None:
        """Let init execute its program; returns once it did, and its poststart hooks were run.

        before_hooks: called, once or twice, before there may be a hook that asks about the container; it can't be
        started again by then. Raises ExecFailed (exec_not_found, exec_denied, setup) if it can't, or a hook failed;
        init is ending then, for the caller to reap.
        """
        if self._channel is None:
            raise ExecFailed(SETUP, "the container was started already")
        channel, self._channel = self._channel, None
        try:
            channel.send_start()
            limit_s = SETUP_S
            if self.spec.hooks is not None and self.spec.hooks.start_container:
                before_hooks()
                limit_s = math.inf
            # An init that stays executes nothing itself, and by its child's end of the channel alone it can't be told
            # whether that was killed before: then it has run for as long as that took.
            stays = self.spec.annotations.get(ANNOTATION) == "true"
            await_exec(channel, self.init, limit_s, by_child=stays)
        except (BrokenPipeError, ConnectionResetError) as e:
            raise ExecFailed(SETUP, "the container's init ended before it was started") from e
        except EndedEarly as e:
            raise ExecFailed(SETUP, "the container's init was killed before it executed its program") from e
        finally:
            channel.close()
        if self.spec.hooks is not None and self.spec.hooks.poststart:
            before_hooks()
            self._run_poststart(self.spec.hooks)

    def _run_poststart(self, hooks: Hooks) -> None:
        from corral.oci.hooks import run_hooks

        try:
            state = self.state.at(RUNNING, self.init.pid)
            run_hooks(hooks, "poststart", state, env=os.environ, directory=self.bundle)
        except ExecFailed:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(self.init.pidfd, signal.SIGKILL)
            raise

    def close(self) -> None:
        """Let go of a container that is not to be started: its init ends. No effect on a started one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def leave_at_gate(self) -> None:
        """Let init wait for start at the gate it was created with, which this process then may leave to others.

        Raises ExecFailed if it has ended.
        """
        try:
            if self._channel is not None:
                self._channel.send_start()
        except (BrokenPipeError, ConnectionResetError) as e:
            raise ExecFailed(SETUP, "the container's init ended before it was started") from e
        self.close()

    def exec(
        self,
        process_spec: Process,
        *,
        user: str | None = None,
        stdio: Stdio,
        cgroup_paths: Sequence[str | os.PathLike[str]] = (),
        exact_cgroup: bool = False,
        dies_with_runtime: bool = False,
        before_start: Callable[[ProcessHandle], None] = lambda _handle: None,
    ) -> ProcessHandle:
        """Run one more process inside; returns once its program was executed.

        user (`name|uid[:group|gid]`, looked up in the container) overrides process_spec.user. Without capabilities of
        its own the process gets those of init. cgroup_paths: as for create(); where the v2 one takes no process, that
        below it where init is, unless it has to be exact_cgroup. dies_with_runtime: unless its program has or gains
        more than its user had, or asks not to be. before_start: called with a process that is about to be told to
        execute the program, and ends if this one does before; again if it can't, and another one is tried.
        Raises ExecFailed; then it was killed, and is reaped, unless something keeps it from ending.
        """
        from corral.oci.joining import begin  # most containers are started by who execs nothing

        cgroups = [os.fspath(path) for path in cgroup_paths]
        try:
            return begin(
                self,
                process_spec,
                user,
                stdio,
                cgroups,
                exact_cgroup=exact_cgroup,
                dies_with_runtime=dies_with_runtime,
                before_start=before_start,
            )
        except ProcessLookupError as e:
            raise ExecFailed(SETUP, _NOT_RUNNING) from e
        except ChildError as e:  # which may be anybody's word
            ended = e.errno == errno.ESRCH and process.is_dying(self.init.pid)
            raise ExecFailed(SETUP, _NOT_RUNNING if ended else e.strerror or "") from e

    @classmethod
    def adopt(
        cls,
        spec: Spec,
        *,
        pid: int,
        start_time: int,
        gate: str | None = None,
        container_id: str = "",
        bundle: str = "/",
    ) -> "Container":
        """A container whose init was made by somebody else: for exec or, with the path of the gate it waits at, start.

        container_id, bundle: what hooks and seccomp listeners are told.
        Raises ProcessLookupError if pid is no longer the process that began at start_time; FileNotFoundError or
        ConnectionRefusedError if nobody waits at the gate.
        """
        pidfd = process.pidfd_open(pid)
        try:
            if process.start_time(pid) != start_time:
                raise ProcessLookupError(3, f"process {pid} is not the container's init any more")
        except FileNotFoundError as e:
            os.close(pidfd)
            raise ProcessLookupError(3, f"process {pid} is gone") from e
        except BaseException:
            os.close(pidfd)
            raise
        try:
            channel = None if gate is None else ParentEnd(gates.connect(gate))
        except BaseException:
            os.close(pidfd)
            raise
        return cls(spec, ProcessHandle(pid, pidfd, start_time, None), channel, container_id, bundle)
