"""The way into the namespaces of a container that has a user namespace, or a new time namespace.

Everything a container has is to belong to its user namespace, so that is entered first, and what is made afterwards by
its members does. A time namespace is entered by children only. So init has a predecessor, the guide, which is born on
the host and goes this way:

    joins its cgroups, and by path all namespaces that the host can; takes what it needs of the host's files and makes
    the root, as far as it is privileged there; unshares or joins the user namespace; unshares the time namespace
    guide  -> parent  {"entered": true}
    the parent writes the id mappings and clock offsets, and gives the pipes of the process to the container's root
    parent -> guide   true
    becomes root in there, joins the namespaces that only this one can, and has a child, which goes on as init
    guide  -> parent  {"born": PID}

An ordinary user's guide is not privileged: there init takes the host's files, as far as they are the user's. Source:
user_namespaces(7), time_namespaces(7).
"""

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

from corral.kernel import capabilities, credentials, namespaces, process, rlimits, time_namespaces, user_namespaces
from corral.kernel.namespaces import Kind
from corral.oci import program as programs
from corral.oci.cgroups import Membership
from corral.oci.channel import ChildEnd
from corral.oci.init import InitPlan, Way, enter_privately, prepare_root, proceed, report_and_exit
from corral.oci.mounts import RootFilesystem
from corral.oci.plan import ranges
from corral.oci.spec import Spec
from corral.oci.stage import Stage, normal
from corral.oci.stdio import Stdio


@dataclass(frozen=True, slots=True)
class Passage:
    """Which way it is."""

    unshare: int
    """CLONE_NEWUSER and CLONE_NEWTIME, where these are new."""
    user: tuple[int, str] | None
    """fd and path of a user namespace that is joined."""
    clone: int
    """CLONE_NEW* that init is born into."""
    privileged: bool
    """The caller is root."""


def passage_of(new: Collection[Kind], user: tuple[int, str] | None) -> Passage:
    """The way to the namespaces in new, of kinds that are to be made, by the one user that is joined."""
    first = {kind for kind in new if kind in (Kind.USER, Kind.TIME)}
    rest = {kind for kind in new if kind not in first}
    privileged = os.geteuid() == 0 and bool(capabilities.effective() >> capabilities.SYS_ADMIN & 1)
    return Passage(namespaces.flags_of(first), user, namespaces.flags_of(rest), privileged)


def run_guide(
    plan: InitPlan, way: Way, passage: Passage, channel: ChildEnd, stdio: Stdio, membership: Membership
) -> NoReturn:
    """Be the guide, and then init; never returns."""
    try:
        joined = [] if passage.user is None else [passage.user[0]]
        # The files by which an ordinary user maps ids belong to root as long as nobody may look in.
        visible = os.geteuid() != 0 and bool(passage.unshare)
        enter_privately(channel, stdio, [*way.given(stdio, membership), *joined], visible=visible)
        membership.join_v1()
        programs.begin(plan.program)
        for limit in plan.program.rlimits:
            rlimits.raise_hard(limit.type, limit.hard)
        late = _join_what_the_host_can(way.joins)
        stage = None
        if passage.privileged and plan.steps:
            stage = _take_from_host(plan, way)
        if passage.unshare:
            namespaces.leave(passage.unshare)
        if passage.user is not None:
            namespaces.join(passage.user[0], Kind.USER.flag, what=passage.user[1])
        channel.send("entered")
        if channel.receive_answer() is None:
            os._exit(1)
        if passage.user is not None or passage.unshare & Kind.USER.flag:
            credentials.become_root()
        process.set_dumpable(False)
        for fd, flag, path in late:
            namespaces.join(fd, flag, what=path)
        pid, _ = process.clone(process.CLONE_PARENT | passage.clone)
        if pid:
            channel.send("born", pid)
            os._exit(0)
        if channel.receive_answer() is None:
            os._exit(1)
        os.setsid()
        if plan.program.labels is not None:
            plan.program.labels.take_hold_again(hosts_procfs=bool(plan.steps))
        proceed(plan, channel, stdio, way, stage)
    except BaseException as e:  # noqa: BLE001 - a fork of the runtime must not run on in its code
        report_and_exit(channel, e)


def _join_what_the_host_can(joins: Sequence[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """What is left belongs to the user namespace that is joined as well."""
    late = []
    for fd, flag, path in joins:
        try:
            namespaces.join(fd, flag, what=path)
        except PermissionError:
            late.append((fd, flag, path))
    return late


def _take_from_host(plan: InitPlan, way: Way) -> Stage:
    """Open what the host gives, and make the root, in a mount namespace of the guide's own.

    init's will be a copy, where the working directory still is the bundle, by whatever name, and however closed the
    way there.
    """
    namespaces.leave(Kind.MOUNT.flag)
    os.chdir(plan.bundle)
    stage = prepare_root(plan, way)
    root = plan.steps[0]
    if isinstance(root, RootFilesystem):
        root.make(stage)
    stage.bundle = ""
    return stage


def serve_guide(pid: int, spec: Spec, stdio: Stdio, cgroups: Sequence[str]) -> None:
    """Do what only the host can for the guide, process pid, once it has entered its namespaces.

    cgroups: the directories of its cgroups.
    Raises OSError, or ValueError where config.json says other ids of a joined user namespace than it has.
    """
    kinds = {namespace.type: namespace for namespace in spec.linux.namespaces}
    if (user := kinds.get(Kind.USER)) is not None:
        wanted = ranges(spec.linux.uid_mappings), ranges(spec.linux.gid_mappings)
        if user.path:
            _check_mappings(pid, *wanted)
        else:
            user_namespaces.write_mappings(pid, *wanted)
        give_stdio(pid, stdio)
        if len(cgroups) == 1 and _may_have_cgroup(spec):
            _give_cgroup(pid, spec, cgroups[0])
    if spec.linux.time_offsets:
        offsets = [(clock, each.secs, each.nanosecs) for clock, each in spec.linux.time_offsets.items()]
        try:
            time_namespaces.write_offsets(pid, offsets)
        except OSError as e:
            if e.errno == errno.ERANGE:
                raise ValueError(f"linux.timeOffsets: {e.strerror}") from e
            raise


def _check_mappings(pid: int, *wanted: user_namespaces.Ranges) -> None:
    for name, asked, found in zip(("uid", "gid"), wanted, user_namespaces.read_mappings(pid), strict=True):
        if asked and sorted(asked) != sorted(found):
            raise ValueError(f"linux.{name}Mappings: the user namespace that is joined has others: {found}")


def _may_have_cgroup(spec: Spec) -> bool:
    """Whether the container is to manage its own cgroup. Source: runtime-spec config-linux.md "Cgroup ownership"."""
    return any(each.type is Kind.CGROUP and not each.path for each in spec.linux.namespaces) and any(
        mount.type in ("cgroup", "cgroup2") and normal(mount.destination) == _CGROUPS and "ro" not in mount.options
        for mount in spec.mounts
    )


def _give_cgroup(pid: int, spec: Spec, cgroup: str) -> None:
    """Give a cgroup of v2 to the user of the container's process; the files that hold limits stay the host's."""
    uids, _ = user_namespaces.read_mappings(pid)
    uid = user_namespaces.to_outside(uids, spec.process.user.uid if spec.process is not None else 0)
    if uid is None or os.path.exists(f"{cgroup}/tasks"):  # noqa: PTH110 - a string; v1 can't be given away safely
        return
    with open(_DELEGATE, encoding="ascii") as file:
        names = file.read().split()
    with contextlib.suppress(PermissionError):  # an ordinary user's, who has it already or can't
        os.chown(cgroup, uid, -1)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.chown(f"{cgroup}/{name}", uid, -1)


_CGROUPS = "/sys/fs/cgroup"
_DELEGATE = "/sys/kernel/cgroup/delegate"


def give_stdio(pid: int, stdio: Stdio, *, pidfd: int | None = None) -> None:
    """Give pipes for 0, 1 and 2 to the root of process pid's user namespace, who may then pass them on.

    pidfd: of a process that is not the caller's to reap, which raises ProcessLookupError if somebody did.
    """
    uids, gids = user_namespaces.read_mappings(pid)
    if pidfd is not None:
        process.check_unreaped(pidfd)
    uid, gid = user_namespaces.to_outside(uids, 0), user_namespaces.to_outside(gids, 0)
    if uid is None or gid is None:
        return
    for fd in {stdio.stdin, stdio.stdout, stdio.stderr} - {None}:
        assert fd is not None
        status = os.fstat(fd)
        if stat.S_ISFIFO(status.st_mode) and (status.st_uid, status.st_gid) != (uid, gid):
            with contextlib.suppress(PermissionError):  # a peer's that may not be given away
                os.fchown(fd, uid, gid)
