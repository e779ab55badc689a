"""The first process of a container, from its birth to execve.

It is a fork of the runtime, with all its privilege, and goes from the host's view into the container's. What comes
from the host is opened first; then imports are closed; from pivot_root on there is only the container's own view.
"""

import _socket as socket  # the part in C, which has all that is used here and takes a tenth of the time to load
import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from corral.kernel import hostname, loopback, mount, namespaces, paths, process, tty
from corral.kernel.mount import MS_PRIVATE
from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import AT_FDCWD
from corral.oci import crossing
from corral.oci import program as programs
from corral.oci.cgroups import Membership
from corral.oci.channel import ChildEnd
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.gate import wait_at
from corral.oci.imports import close_imports
from corral.oci.program import Program
from corral.oci.stage import IdMap, PidNamespace, Stage, Step
from corral.oci.stdio import Stdio, take_places, use_own_null, use_terminal
from corral.oci.sysctl import write_sysctl

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.oci.hooks import InitHooks
    from corral.oci.larder import Larder


@dataclass(frozen=True, slots=True)
class InitPlan:
    """All that init needs to know, computed before it is born."""

    bundle: str
    steps: tuple[Step, ...]
    program: Program
    hostname: str
    domainname: str
    sysctl: Mapping[str, str]
    propagation: int
    """MS_* of the root mount in the end."""
    propagation_recursive: bool
    unshare: int
    """CLONE_NEW* that init leaves by itself, once it is in its cgroup."""
    loopback: bool
    """The network namespace is new, so nobody has brought up its loopback interface."""
    new_keyring: bool
    own: frozenset[Kind] | None = None
    """In a user namespace, be it the runtime's: the kinds of namespaces that are made, and so belong to it."""
    devices: tuple[str, ...] = ()
    """Network devices that are moved in, by their names inside."""
    idmaps: tuple[IdMap, ...] = ()
    """Those of the steps."""
    hooks: "InitHooks | None" = None
    shares_mounts: bool = False
    """The container's mount namespace is the runtime's own."""
    stays: bool = False
    """It stays pid 1 beside its program, see corral.oci.reaper."""
    by_stone: bool = False
    """Python is left before start, see corral.oci.stepping_stone."""


@dataclass(frozen=True, slots=True)
class Way:
    """What init is given by fd."""

    joins: Sequence[tuple[int, int, str]] = ()
    """(fd, CLONE_NEW* flag, path) of namespaces to enter."""
    gate: int | None = None
    """Where to wait for start, once the runtime that made this process has left it there."""
    larder: "Larder | None" = None
    """Mounts made ahead."""
    pids: PidNamespace | None = None
    """The PID namespace to enter, by a successor."""
    idmaps: Mapping[IdMap, int] = field(default_factory=dict)
    """User namespaces for id-mapped mounts."""
    parts: tuple[int, ...] = ()
    """Mounts that the root is put together from."""
    pipe: int | None = None
    """Whose end tells the process that was before of the program, see corral.kernel.rebirth."""

    def given(self, stdio: Stdio, membership: Membership) -> list[int]:
        """All fds that are needed."""
        gates = [fd for fd in (self.gate, self.pipe) if fd is not None]
        ready = [] if self.larder is None else self.larder.fds
        joined = [*(fd for fd, _, _ in self.joins), *([] if self.pids is None else [self.pids.fd])]
        return [*stdio.given(), *gates, *membership.fds, *ready, *joined, *self.idmaps.values(), *self.parts]


def run_init(
    plan: InitPlan,
    channel: ChildEnd,
    stdio: Stdio,
    membership: Membership,
    way: Way,
) -> NoReturn:
    """Be the init of a container; never returns."""
    try:
        enter_privately(channel, stdio, way.given(stdio, membership))
        membership.join_v1()
        programs.begin(plan.program)
        for fd, flag, path in way.joins:
            namespaces.join(fd, flag, what=path)
        if plan.unshare:
            namespaces.leave(plan.unshare)
        home = _leave_home() if plan.shares_mounts else None
        proceed(plan, channel, stdio, way, home=home)
    except BaseException as e:  # noqa: BLE001 - a fork of the runtime must not run on in its code
        report_and_exit(channel, e)


def proceed(
    plan: InitPlan,
    channel: ChildEnd,
    stdio: Stdio,
    way: Way,
    stage: Stage | None = None,
    *,
    home: int | None = None,
) -> NoReturn:
    """Go on as init, in the namespaces of the container; the caller reports what this raises.

    stage: one for which all of the steps are prepared. home: the mount namespace to return to.
    """
    gate, pids = way.gate, way.pids
    gates = [fd for fd in (gate, way.pipe) if fd is not None]
    if plan.loopback:
        loopback.bring_up()
    if plan.devices:
        from corral.oci.net_devices import take_devices  # loaded by who made the plan

        take_devices(channel, plan.devices)
    if plan.new_keyring:
        programs.leave_keyring(plan.program)
    if plan.hooks is not None:
        plan.hooks.take(channel)
    stage = build_root(plan, way, stage) if plan.steps else _joined_root(plan)
    if home is not None:
        _go_home(stage, home)
    if way.pipe is not None:
        from corral.kernel import rebirth  # loaded by who has the pipe

        rebirth.await_harmless(way.pipe)
    if pids is not None:
        namespaces.join(pids.fd, Kind.PID.flag, what=pids.path)
    stone = _make_stone(plan, channel, way)
    program = settle(plan, stage, stdio, channel.send_listener, controlling=pids is None)
    if gate is not None or plan.by_stone:  # who starts it may not be there to be told, and a stone can't tell all
        programs.check_executable(program)
    kept = [*stdio.kept, *gates]
    if pids is not None:
        go_on(program, channel, stage.console_master, kept, stone, gate)
    else:
        hand_back(channel, stage.console_master, [*kept, *([] if stone is None else [stone])])
        if stone is not None:
            crossing.cross(stone, program, channel.fileno(), gate)
    if not channel.wait_for_start():
        os._exit(1)
    if gate is not None:
        channel = wait_at(gate, channel)
    _execute(plan, program, channel)


def _execute(plan: InitPlan, program: programs.Program, channel: ChildEnd) -> NoReturn:
    """Become the program; channel is to who has started it, who is told what goes wrong."""
    try:
        if plan.hooks is not None and plan.hooks.at_start:
            program = programs.filtered(program)
            plan.hooks.start(program.env)
        if plan.stays:
            from corral.oci import reaper  # loaded by who made the plan

            reaper.stay(channel, program)
        programs.execute(program)
    except BaseException as e:  # noqa: BLE001 - likewise
        report_and_exit(channel, e)


def _make_stone(plan: InitPlan, channel: ChildEnd, way: Way) -> int | None:
    if plan.by_stone:
        return crossing.make(plan.program.args[0], channel.fileno(), way.gate)
    if way.pids is None or plan.stays or (plan.hooks is not None and plan.hooks.at_start):
        return None
    return crossing.make_for_successor(plan.program, channel.fileno(), way.gate)


def enter_privately(channel: ChildEnd, stdio: Stdio, keep: Iterable[int], *, visible: bool = False) -> None:
    """The first steps of a newborn: no signal handler, fd or session of the runtime is left, and nobody may look in.

    visible: but for that last thing, which is to be done later.
    """
    if not visible:
        process.set_dumpable(False)
    process.reset_signals()
    process.close_fds([*keep, channel.fileno(), *range(3)])
    take_places(stdio)
    os.setsid()
    os.umask(0)
    close_imports()


def hand_back(channel: ChildEnd, console: int | None, keep: Sequence[int] = ()) -> None:
    """Have nothing but 0, 1, 2, the channel and keep; give the runtime the pty master and tell it that all is ready."""
    consoles = [] if console is None else [console]
    process.close_fds([0, 1, 2, channel.fileno(), *keep, *consoles])
    channel.send_ready(console)
    for fd in consoles:
        os.close(fd)


def go_on(
    program: Program,
    channel: ChildEnd,
    console: int | None,
    keep: Sequence[int],
    stone: int | None,
    gate: int | None = None,
) -> None:
    """Have a successor, in the PID namespace that was joined, and tell the runtime of it; only the successor returns.

    Whoever holds CAP_SYS_PTRACE in that namespace can look through its eyes and guide its hands as soon as it is born
    (CVE-2016-9962). So by then it has but the program's own view, identity, capabilities and filter, or one that also
    allows what is left to be done (corral.oci.seccomp.UNTIL_EXECVE). stone: one that has the successor instead, which
    then has none of the runtime's memory either.
    """
    if stone is not None and not crossing.is_executed_alike(program):
        stone = None
    if stone is not None:
        programs.refuse_directory(program)
    consoles, stones = [[] if fd is None else [fd] for fd in (console, stone)]
    process.close_fds([0, 1, 2, channel.fileno(), *keep, *consoles, *stones])
    channel.send_ready(console, successor=True)
    for fd in consoles:
        os.close(fd)
    if stone is not None:
        with contextlib.suppress(OSError):
            crossing.cross(stone, program, channel.fileno(), gate)
        os.close(stone)
    pid, _ = process.clone(process.CLONE_PARENT)
    if pid:
        channel.send_number(pid)
        os._exit(0)
    os.setsid()
    if console is not None:
        tty.make_controlling(0)


def report_and_exit(channel: ChildEnd, error: BaseException) -> NoReturn:
    """Tell the runtime what went wrong, and end."""
    try:
        channel.send_error(error)
    finally:
        os._exit(1)


def _joined_root(plan: InitPlan) -> Stage:
    """The root of a mount namespace that was joined: its owner has set it up."""
    stage = Stage(plan.bundle, root=os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    if plan.hooks is not None:
        plan.hooks.apply(stage)
    return stage


def prepare_root(plan: InitPlan, way: Way) -> Stage:
    """Take what the host gives."""
    stage = Stage(plan.bundle, pids=way.pids, own=plan.own, idmaps=way.idmaps, parts=way.parts)
    if way.larder is not None:
        way.larder.serve(stage, plan.steps)
    for step in plan.steps:
        step.prepare(stage)
    # Only now: what prepare() cloned keeps its peers where the mount asks for that; nothing else of ours gets out.
    mount.set_propagation("/", MS_PRIVATE, recursive=True)
    return stage


def build_root(plan: InitPlan, way: Way, stage: Stage | None = None) -> Stage:
    """Mount everything and make it the root: what follows sees the container's view only.

    stage: what prepare_root() gave.
    """
    if stage is None:
        stage = prepare_root(plan, way)
    for step in plan.steps:
        step.apply(stage)
    _check_place(stage, "proc", stage.proc)
    _check_place(stage, "sys", stage.sys)
    mount.pivot_root_to(stage.root)
    if plan.propagation != MS_PRIVATE:
        mount.set_propagation("/", plan.propagation, recursive=plan.propagation_recursive)
    return stage


def _leave_home() -> int:
    """A mount namespace to make the root in; what is returned is the one that was left."""
    home = namespaces.open_namespace("/proc/self/ns/mnt")
    namespaces.leave(Kind.MOUNT.flag)
    return home


def _go_home(stage: Stage, home: int) -> None:
    """Be in the runtime's mount namespace, with the container's root as the root, which is no mount of it.

    Nobody there sees the container's mounts; they end with its last process, and have nothing above them that one could
    climb to. The kernel takes such a process for one in a chroot, and mounts that are in no namespace of its own for
    nosuid; /proc/self/mountinfo is empty.
    """
    tree = mount.clone_tree(AT_FDCWD, "/", recursive=True)
    namespaces.join(home, Kind.MOUNT.flag, what="the runtime's mount namespace")
    os.close(home)
    os.fchdir(tree)
    os.chroot(".")
    os.close(stage.root)
    stage.root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.close(tree)


def _check_place(stage: Stage, name: str, expected: int | None) -> None:
    """What a process in the container will find at /proc, or /sys, must be what was mounted there."""
    if expected is None:
        return
    flags = os.O_PATH | os.O_DIRECTORY
    with paths.opened(paths.open_in_root(stage.root, name, flags, resolve=paths.RESOLVE_NO_SYMLINKS)) as fd:
        if not os.path.samestat(os.fstat(fd), os.fstat(expected)):
            raise ExecFailed(SETUP, f"mount /{name}: it was exchanged meanwhile")


def settle(
    plan: InitPlan, stage: Stage, stdio: Stdio, tell_listener: Callable[[int], None], *, controlling: bool = True
) -> Program:
    """What is left to do inside, up to giving up all privilege; what is returned is ready for execute().

    tell_listener: as for become(). controlling: this process takes the terminal, if there is one.
    """
    write_sysctl(plan.sysctl, stage.root)
    if plan.hostname:
        socket.sethostname(plan.hostname)
    if plan.domainname:
        hostname.set_domain_name(plan.domainname)
    if stage.console_slave is not None:
        use_terminal(stage.console_slave, stdio, controlling=controlling)
    else:
        use_own_null(stage.root, stdio)
    return programs.become(plan.program, stage.root, programs.identity_of(plan.program, stage.root), tell_listener)
