"""The runtime core: create, start and exec of containers.

    container = create(spec, bundle=…, rootfs=[Mount(type="overlay", …)], cgroup_paths=[…], stdio=Stdio(out, out, out))
    …                                   # init exists, is set up, and waits
    container.start()                   # init executes the program
    handle = container.exec(process, stdio=Stdio())
    os.waitid(os.P_PIDFD, container.init.pidfd, os.WEXITED)

Everything here is synchronous and for a single-threaded process: the shim. Processes made are children of the caller,
who must reap every one of them: init's exit waits, in the kernel, for all exec'ed processes to be reaped. What goes
wrong raises ExecFailed (about the container), OSError (about the host) or ValueError (about the specification, before
anything was done); then no process is left, and with it no namespace or mount.
"""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from corral.kernel import namespaces, process
from corral.kernel.namespaces import Kind
from corral.oci import gate as gates
from corral.oci import plan as plans
from corral.oci.attendance import (
    SETUP_S,
    await_exec,
    follow_guide,
    give_devices,
    heeded,
    how_it_ended,
    idmap_namespaces,
    kill_and_reap,
    patience,
)
from corral.oci.cgroups import TAKES_NONE, Membership
from corral.oci.channel import ChildEnd, EndedEarly, ParentEnd, make_pair
from corral.oci.errors import EXEC_DENIED, EXEC_NOT_FOUND, SETUP, ExecFailed
from corral.oci.init import InitPlan, Way, run_init
from corral.oci.join import run_joined
from corral.oci.program import Program, program_of
from corral.oci.spec import Hooks, Mount, Process, Seccomp, Spec
from corral.oci.stage import PidNamespace, Step
from corral.oci.state import CREATING, RUNNING, State
from corral.oci.stdio import Stdio
from corral.oci.support import check_process, check_spec
from corral.oci.sysctl import check_sysctl

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.kernel.seccomp import Filter
    from corral.oci.allotment import Allotment
    from corral.oci.hooks import InitHooks
    from corral.oci.larder import Larder

__all__ = [
    "EXEC_DENIED",
    "EXEC_NOT_FOUND",
    "SETUP",
    "Container",
    "ExecFailed",
    "ProcessHandle",
    "Stdio",
    "create",
]

EXEC_SETUP_S = 10.0


@dataclass(slots=True)
class ProcessHandle:
    """A process in a container. The caller owns the fds.

    pid is the host's; with start_time (field 22 of /proc/<pid>/stat) it names the process for good. console is the pty
    master, opened inside the container's devpts; None without a terminal.
    """

    pid: int
    pidfd: int
    start_time: int
    console: int | None


@dataclass(slots=True)
class Container:
    """A container whose init exists."""

    spec: Spec
    init: ProcessHandle
    _channel: ParentEnd | None
    id: str = ""
    """What hooks and seccomp listeners are told it is called."""
    bundle: str = ""

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
            await_exec(channel, self.init.pid, self.init.pidfd, self.init.start_time, limit_s)
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
    ) -> ProcessHandle:
        """Run one more process inside; returns once its program was executed.

        user (`name|uid[:group|gid]`, looked up in the container) overrides process_spec.user. Without capabilities of
        its own the process gets those of init. cgroup_paths: as for create(); where the v2 one takes no process, that
        below it where init is, unless it has to be exact_cgroup. Raises ExecFailed; then it was reaped.
        """
        try:
            return _exec(self, process_spec, user, stdio, cgroup_paths, exact_cgroup=exact_cgroup)
        except ProcessLookupError as e:
            raise ExecFailed(SETUP, "the container is not running") from e

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


def create(
    spec: Spec,
    *,
    bundle: str | os.PathLike[str],
    rootfs: Sequence[Mount] = (),
    parts: Sequence[Mount] = (),
    user: str | None = None,
    cgroup_paths: Sequence[str | os.PathLike[str]] = (),
    stdio: Stdio,
    console_size: tuple[int, int] | None = None,
    new_keyring: bool = True,
    gate: int | None = None,
    larder: "Larder | None" = None,
    container_id: str = "",
) -> Container:
    """Make a container: returns when init has finished its set-up and waits for start().

    bundle: a directory of the host; relative sources are below it, and the root is mounted over it, in init's own mount
    namespace only. rootfs: how to make the root (the first one, typically overlay) and what else to mount in it; empty:
    spec.root.path. parts: what the first one is put together from (corral.oci.parts). user (`name|uid[:group|gid]`,
    looked up in the container) overrides spec.process.user. cgroup_paths: the directories to be a member of, one per
    hierarchy, below /sys/fs/cgroup. console_size: (columns, rows).

    gate: the fd of a gate (corral.oci.gate), for leave_at_gate(). larder: mounts made ahead; the caller closes it.
    container_id: what hooks and seccomp listeners are told; without one, the name of the bundle.

    If this fails, the specification's poststop hooks (corral.oci.hooks.run_poststop) are the caller's to run, once it
    has undone what it did.
    """
    cgroups = [os.fspath(path) for path in cgroup_paths]
    plan = plan_of(
        spec,
        bundle=os.fspath(bundle),
        rootfs=rootfs,
        user=user,
        cgroups=cgroups,
        console_size=console_size,
        new_keyring=new_keyring,
        container_id=container_id,
    )
    new, joined = plans.created(spec), plans.joined(spec)
    guided = Kind.TIME in new or Kind.USER in {*new, *joined}
    flags = namespaces.flags_of(new - {Kind.CGROUP})
    with contextlib.ExitStack() as stack:
        membership = Membership.open(cgroups)
        stack.callback(membership.close)
        joins: list[tuple[int, int, str]] = []
        pids: PidNamespace | None = None
        entered: tuple[int, str] | None = None
        for kind, path in joined.items():
            fd = namespaces.open_namespace(path)
            stack.callback(os.close, fd)
            if kind is Kind.PID:
                pids = PidNamespace(fd, path)
            elif kind is Kind.USER:
                entered = fd, path
            else:
                joins.append((fd, kind.flag, path))
        idmaps = idmap_namespaces(plan, stack) if plan.idmaps else {}
        made: tuple[int, ...] = ()
        if parts:
            from corral.oci.parts import make_parts

            made = make_parts(parts, stack)
        way = Way(joins, gate, None if guided else larder, pids, idmaps, made)
        from_here = pids is not None
        if guided:
            from corral.oci.passage import passage_of, run_guide

            passage = passage_of(new, entered)
            from_here = from_here or passage.privileged
        inits = replace(plan, program=_ancestor(plan.program)) if from_here else plan

        def be_init(child: ChildEnd) -> NoReturn:
            if guided:
                run_guide(inits, way, passage, child, stdio, membership)
            run_init(inits, child, stdio, membership, way)

        parent, pid, pidfd = _born(0 if guided else flags, membership, be_init)
    if guided:
        pid, pidfd = follow_guide(parent, pid, pidfd, spec, stdio, cgroups)
    if plan.devices:
        give_devices(parent, pid, pidfd, spec)
    where = os.fspath(bundle)
    container = Container(
        spec, ProcessHandle(pid, pidfd, 0, None), parent, container_id or where.rpartition("/")[2], where
    )
    limit_s = math.inf if plan.hooks is not None and plan.hooks.has_patience else SETUP_S
    allotment = plan.program.allotment if from_here else None
    container.init = _await_ready(container, allotment, parent, pid, pidfd, limit_s, creating=True)
    return container


def plan_of(
    spec: Spec,
    *,
    bundle: str,
    rootfs: Sequence[Mount],
    user: str | None,
    cgroups: Sequence[str],
    console_size: tuple[int, int] | None,
    new_keyring: bool = True,
    container_id: str = "",
) -> InitPlan:
    """All that init needs to know. Raises ValueError naming the member that can't be honoured."""
    check_spec(spec)
    assert spec.process is not None
    new = plans.created(spec)
    if console_size is None and (box := spec.process.console_size) is not None:
        console_size = (box.width, box.height)
    steps: list[Step] = []
    hooks, place = (None, bundle) if spec.hooks is None else _hooks(spec, spec.hooks, bundle, container_id)
    if Kind.MOUNT in new:
        steps = plans.steps_of(
            spec, bundle=bundle, rootfs=rootfs, cgroups=cgroups, console_size=console_size, hooks=hooks
        )
    program = program_of(spec.process, spec.linux, user=user, seccomp=_filter(spec.linux.seccomp))
    return InitPlan(
        bundle=place,
        steps=tuple(steps),
        program=program,
        hostname=spec.hostname,
        domainname=spec.domainname,
        sysctl=check_sysctl(spec.linux.sysctl, [namespace.type for namespace in spec.linux.namespaces]),
        propagation=plans.PROPAGATION[spec.linux.rootfs_propagation],
        propagation_recursive=spec.linux.rootfs_propagation[:1] == "r",
        unshare=Kind.CGROUP.flag if Kind.CGROUP in new else 0,
        loopback=Kind.NETWORK in new,
        new_keyring=new_keyring,
        own=frozenset(new) if program.in_user_namespace else None,
        devices=_devices(spec),
        idmaps=plans.idmaps_of(steps),
        hooks=hooks,
    )


def _hooks(spec: Spec, hooks: Hooks, bundle: str, container_id: str) -> "tuple[InitHooks, str]":
    """What init has to do with hooks; and where the root is put for them to see, which is where config.json says."""
    from corral.oci.hooks import InitHooks

    place = os.path.join(bundle, spec.root.path) if spec.root is not None else bundle  # noqa: PTH118 - as config.json
    state = State(container_id or os.path.basename(bundle), bundle, spec.annotations)  # noqa: PTH119 - likewise
    return InitHooks(hooks, state), place if os.path.isdir(place) else bundle  # noqa: PTH112 - likewise


def _devices(spec: Spec) -> tuple[str, ...]:
    if not spec.linux.net_devices:
        return ()
    from corral.oci.net_devices import names_inside

    return names_inside(spec.linux.net_devices)


def _filter(profile: Seccomp | None) -> "Filter | None":
    if profile is None:
        return None
    from corral.oci.seccomp import filter_of

    return filter_of(profile)


def _born(flags: int, membership: Membership, live: Callable[[ChildEnd], NoReturn]) -> tuple[ParentEnd, int, int]:
    """A child, whose life is live(): the channel to it, its pid and its pidfd."""
    parent, child = make_pair()
    try:
        pid, pidfd = process.clone(flags, cgroup=membership.unified)
        if pid == 0:
            live(child)
    except BaseException:
        parent.close()
        raise
    finally:
        child.close()
    return parent, pid, pidfd


def _await_ready(
    container: Container,
    allotment: "Allotment | None",
    parent: ParentEnd,
    pid: int,
    pidfd: int,
    limit_s: float,
    *,
    creating: bool,
) -> ProcessHandle:
    """See a child to the end of its set-up, and where it has a successor go on with that.

    allotment: whose scheduler is set from here.
    """

    def pass_listener(fd: int) -> None:
        from corral.oci.listener import pass_to_listener

        state = container.state.at(CREATING, pid) if creating else container.state.at(RUNNING, container.init.pid)
        assert container.spec.linux.seccomp is not None
        pass_to_listener(container.spec.linux.seccomp, fd, pid, state)

    def run_hooks() -> None:
        from corral.oci import hooks

        assert container.spec.hooks is not None
        for point in ("prestart", "create_runtime"):
            state = container.state.at(CREATING, pid)
            hooks.run_hooks(container.spec.hooks, point, state, env=os.environ, directory=container.bundle)

    try:
        console, successor = parent.receive_ready(patience(pidfd, limit_s), pass_listener, run_hooks)
        if successor is not None:
            # Our own child, not reaped yet: the pid is still its.
            follower = process.pidfd_open(successor)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
            pid, pidfd = successor, follower
        if allotment is not None:
            allotment.schedule(pid)
        return ProcessHandle(pid, pidfd, process.start_time(pid), console)
    except EndedEarly as e:
        raise ExecFailed(SETUP, how_it_ended(kill_and_reap(parent, pidfd))) from e
    except BaseException:
        kill_and_reap(parent, pidfd)
        raise


def _ancestor(program: Program) -> Program:
    """The program for a process that has a successor, or little power: less what the runtime does for it."""
    if program.allotment is None:
        return program
    return replace(program, allotment=program.allotment.inherited())


def _exec(
    container: Container,
    spec: Process,
    user: str | None,
    stdio: Stdio,
    cgroup_paths: Sequence[str | os.PathLike[str]],
    *,
    exact_cgroup: bool,
) -> ProcessHandle:
    check_process(spec)
    own = container.spec.process
    if spec.capabilities is None and own is not None:
        spec = replace(spec, capabilities=own.capabilities)
    if spec.exec_cpu_affinity is None and own is not None and own.exec_cpu_affinity is not None:
        spec = replace(spec, exec_cpu_affinity=own.exec_cpu_affinity)
    linux = container.spec.linux
    program = program_of(spec, linux, user=user, seccomp=_filter(linux.seccomp))
    affinity = None
    if spec.exec_cpu_affinity is not None:
        from corral.oci.allotment import affinity_of

        affinity = affinity_of(spec)
    kinds = {namespace.type for namespace in linux.namespaces}
    terminal = None
    if spec.terminal:
        terminal = (spec.console_size.width, spec.console_size.height) if spec.console_size else (0, 0)
    if Kind.USER in kinds:
        from corral.oci.passage import give_stdio

        give_stdio(container.init.pid, stdio, pidfd=container.init.pidfd)
    init, cgroups = container.init, [os.fspath(path) for path in cgroup_paths]

    def be_in(membership: Membership) -> tuple[ParentEnd, int, int]:
        def join(child: ChildEnd) -> NoReturn:
            run_joined(
                _ancestor(program),
                child,
                stdio,
                membership,
                init=init.pidfd,
                flags=namespaces.flags_of(kinds),
                terminal=terminal,
                affinity=affinity,
            )

        return _born(0, membership, join)

    with contextlib.nullcontext() if affinity is None else affinity.children_begin():
        try:
            with contextlib.closing(Membership.open(cgroups)) as membership:
                parent, pid, pidfd = be_in(membership)
        except OSError as e:
            if exact_cgroup or e.errno not in TAKES_NONE:
                raise
            if (nearby := Membership.beside(init.pid, init.pidfd, cgroups)) is None:
                raise
            with contextlib.closing(nearby):
                parent, pid, pidfd = be_in(nearby)
    handle = _await_ready(container, program.allotment, parent, pid, pidfd, EXEC_SETUP_S, creating=False)
    with contextlib.ExitStack() as undo:
        if handle.console is not None:
            undo.callback(os.close, handle.console)
        with heeded(parent, handle.pidfd):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone: what follows finds out why
                parent.send_start()
            await_exec(parent, handle.pid, handle.pidfd, handle.start_time, EXEC_SETUP_S)
        undo.pop_all()
    parent.close()
    return handle
