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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from corral.kernel import namespaces
from corral.kernel.namespaces import Kind
from corral.oci import plan as plans
from corral.oci.attendance import (
    SETUP_S,
    ProcessHandle,
    await_ready,
    born,
    follow_guide,
    give_devices,
    idmap_namespaces,
    kill_and_reap,
)
from corral.oci.blueprint import plan_of
from corral.oci.cgroups import Membership
from corral.oci.channel import ParentEnd, make_pair
from corral.oci.container import Container
from corral.oci.errors import EXEC_DENIED, EXEC_NOT_FOUND, SETUP, ExecFailed
from corral.oci.init import InitPlan, Way, run_init
from corral.oci.mount_options import COPIES
from corral.oci.reaper import ANNOTATION
from corral.oci.spec import Mount, Spec
from corral.oci.stage import PidNamespace, Step
from corral.oci.stdio import Stdio

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.oci.allotment import Allotment
    from corral.oci.image_mounts import ImageMount
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


@dataclass(frozen=True, slots=True)
class Newborn:
    """An init that sets itself up."""

    channel: ParentEnd
    pid: int
    pidfd: int
    allotment: "Allotment | None" = None
    """What is set from here."""
    limit_s: float = SETUP_S
    """How long it may take."""


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
    by_stone: bool = False,
    secrets: Step | None = None,
    images: "Sequence[ImageMount]" = (),
    meanwhile: Callable[[], None] | None = None,
    midwife: "Callable[[Stdio], Newborn | None] | None" = None,
) -> Container:
    """Make a container: returns when init has finished its set-up and waits for start().

    bundle: a directory of the host; relative sources are below it, and the root is mounted over it, in init's own mount
    namespace only. rootfs: how to make the root (the first one, typically overlay) and what else to mount in it; empty:
    spec.root.path. parts: what the first one is put together from (corral.oci.parts). user (`name|uid[:group|gid]`,
    looked up in the container) overrides spec.process.user. cgroup_paths: the directories to be a member of, one per
    hierarchy, below /sys/fs/cgroup. console_size: (columns, rows).

    gate: the fd of a gate (corral.oci.gate), for leave_at_gate(). larder: mounts made ahead; the caller closes it.
    container_id: what hooks and seccomp listeners are told; without one, the name of the bundle. by_stone: this
    process is not sealed, and the specification suits corral.oci.stepping_stone. secrets: files that no specification
    has (corral.oci.secret_files). images: trees of other images (corral.oci.image_mounts). meanwhile: what else is to
    be done, while init is at work; if that fails, so does this. midwife: who may have an init that does the same
    (go_on_as_init()).

    If this fails, the specification's poststop hooks (corral.oci.hooks.run_poststop) are the caller's to run, once it
    has undone what it did.
    """
    cgroups, place = [os.fspath(path) for path in cgroup_paths], os.fspath(bundle)
    newborn = None if midwife is None else midwife(stdio)
    if newborn is None:
        plan = plan_of(
            spec,
            bundle=place,
            rootfs=rootfs,
            user=user,
            cgroups=cgroups,
            console_size=console_size,
            new_keyring=new_keyring,
            container_id=container_id,
            by_stone=by_stone,
            secrets=secrets,
            images=images,
        )
        newborn = _new_init(spec, plan, cgroups, parts, gate, larder, stdio)
    parent, pid, pidfd = newborn.channel, newborn.pid, newborn.pidfd
    container = Container(
        spec, ProcessHandle(pid, pidfd, 0, None), parent, container_id or place.rpartition("/")[2], place
    )
    if meanwhile is not None:
        try:
            meanwhile()
        except BaseException:
            kill_and_reap(parent, pidfd)
            raise
    container.init = await_ready(container, newborn.allotment, parent, pid, pidfd, newborn.limit_s, creating=True)
    return container


def _new_init(
    spec: Spec,
    plan: InitPlan,
    cgroups: Sequence[str],
    parts: Sequence[Mount],
    gate: int | None,
    larder: "Larder | None",
    stdio: Stdio,
) -> Newborn:
    with contextlib.ExitStack() as stack:
        membership = stack.enter_context(contextlib.closing(Membership.open(cgroups)))
        way, user_namespace = _open_way(spec, plan, parts, gate, larder, stack)
        parent, pid, pidfd, allotment = _bear(spec, plan, way, user_namespace, stdio, membership)
    if _is_guided(spec):
        pid, pidfd = follow_guide(parent, pid, pidfd, spec, stdio, cgroups)
    if plan.devices:
        give_devices(parent, pid, pidfd, spec)
    has_patience = plan.hooks is not None and plan.hooks.has_patience
    return Newborn(parent, pid, pidfd, allotment, math.inf if has_patience else SETUP_S)


def needs_no_talk(spec: Spec) -> bool:
    """Whether init has nothing to ask of the runtime from its birth to its start, and is its own predecessor.

    Nor may it do what the kernel does by memory: let into a time namespace only who shares none, and charge what is
    written to a tmpfs to who has made the writer's, which is outside of the container's cgroup.
    """
    hooks, seccomp = spec.hooks, spec.linux.seccomp
    return (
        {Kind.PID, Kind.MOUNT} <= plans.created(spec)
        and not _is_guided(spec)
        and Kind.TIME not in plans.joined(spec)
        and not any(option in COPIES for each in spec.mounts for option in each.options)
        and hooks is None
        and not spec.linux.net_devices
        and not (seccomp is not None and seccomp.listener_path)
        and ANNOTATION not in spec.annotations
    )


def go_on_as_init(
    spec: Spec,
    *,
    bundle: str | os.PathLike[str],
    rootfs: Sequence[Mount],
    parts: Sequence[Mount],
    user: str | None,
    cgroup_paths: Sequence[str | os.PathLike[str]],
    stdio: Callable[[], Stdio],
    console_size: tuple[int, int] | None,
    larder: "Larder",
    secrets: Step | None,
    images: "Sequence[ImageMount]",
    tell: Callable[[int, int], None],
) -> NoReturn:
    """Become the init of a container that needs_no_talk(), another child of one's parent (corral.kernel.rebirth).

    Arguments as for create(). stdio is asked for when everything else is there. tell gets what the parent goes on with,
    as a Newborn: the pid, and the fd of its end of the channel. Raises before there is an init, or never.
    """
    from corral.kernel import rebirth  # which a command has no use for

    cgroups = [os.fspath(path) for path in cgroup_paths]
    plan = plan_of(
        spec,
        bundle=os.fspath(bundle),
        rootfs=rootfs,
        user=user,
        cgroups=cgroups,
        console_size=console_size,
        secrets=secrets,
        images=images,
    )
    membership, stack = Membership.open(cgroups), contextlib.ExitStack()  # which init closes with all the rest
    way, _ = _open_way(spec, plan, parts, None, larder, stack)
    flags, given = namespaces.flags_of(plans.created(spec) - {Kind.CGROUP}), stdio()
    pid, pipe = rebirth.go_on(flags, cgroup=membership.unified)
    try:
        parent, child = make_pair()
        tell(pid, parent.fileno())
        parent.close()
    except BaseException:  # noqa: BLE001 - the parent takes it for dead
        os._exit(1)
    run_init(plan, child, given, membership, replace(way, pipe=pipe))


def _is_guided(spec: Spec) -> bool:
    """Whether init has a predecessor, see corral.oci.passage."""
    return any(each.type is Kind.USER or (each.type is Kind.TIME and not each.path) for each in spec.linux.namespaces)


def _open_way(
    spec: Spec,
    plan: InitPlan,
    parts: Sequence[Mount],
    gate: int | None,
    larder: "Larder | None",
    stack: contextlib.ExitStack,
) -> tuple[Way, tuple[int, str] | None]:
    """What init is given by fd, and the user namespace that is joined, as fd and path; the stack closes it all."""
    joins: list[tuple[int, int, str]] = []
    pids: PidNamespace | None = None
    user: tuple[int, str] | None = None
    for kind, path in plans.joined(spec).items():
        fd = namespaces.open_namespace(path)
        stack.callback(os.close, fd)
        if kind is Kind.PID:
            pids = PidNamespace(fd, path)
        elif kind is Kind.USER:
            user = fd, path
        else:
            joins.append((fd, kind.flag, path))
    idmaps = idmap_namespaces(plan, stack) if plan.idmaps else {}
    made: tuple[int, ...] = ()
    if parts:
        from corral.oci.parts import make_parts

        made = make_parts(parts, stack)
    return Way(joins, gate, None if _is_guided(spec) else larder, pids, idmaps, made), user


def _bear(
    spec: Spec, plan: InitPlan, way: Way, user: tuple[int, str] | None, stdio: Stdio, membership: Membership
) -> tuple[ParentEnd, int, int, "Allotment | None"]:
    """Init, or its guide: as born(); and whose scheduler is set by the runtime, where it does not outlive a birth."""
    new, program = plans.created(spec), plan.program
    if not _is_guided(spec):
        flags, has_successor = namespaces.flags_of(new - {Kind.CGROUP}), way.pids is not None
        plan = _inherited(plan) if has_successor else plan
        child = born(flags, membership, lambda child: run_init(plan, child, stdio, membership, way))
        return *child, program.allotment if has_successor else None
    from corral.oci.passage import passage_of, run_guide

    passage = passage_of(new, user)
    from_here = way.pids is not None or passage.privileged
    plan = _inherited(plan) if from_here else plan
    child = born(0, membership, lambda child: run_guide(plan, way, passage, child, stdio, membership))
    return *child, program.allotment if from_here else None


def _inherited(plan: InitPlan) -> InitPlan:
    return replace(plan, program=plan.program.inherited())
