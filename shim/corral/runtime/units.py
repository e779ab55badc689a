"""The cgroup of a container as systemd makes it: a scope unit. Loaded for containers that are to have one.

    create   the scope is started around a process that only waits: systemd makes none that is empty
             init is born in its cgroup; the other process ends
             the limits are written to the cgroup's files, and told to systemd, which would undo them otherwise
    update   the same of what changes
    delete   what is left in it is killed; the unit is stopped, and forgotten if it failed

Source: runc docs/systemd.md, for what cgroupsPath and annotations mean.
"""

import contextlib
import errno
import os
import signal
from dataclasses import replace

from corral.kernel import process
from corral.kernel.cgroup import Cgroup, Driver, Layout, Resources, detect, steps
from corral.kernel.cgroup.membership import path_in_v2
from corral.kernel.cgroup.steps import Step
from corral.kernel.cgroup.systemd import scopes
from corral.kernel.cgroup.systemd.manager import BOOTED, PRIVATE, Manager
from corral.kernel.cgroup.systemd.names import SCOPE, SLICE, check_name, slice_path
from corral.kernel.cgroup.systemd.properties import Property
from corral.kernel.dbus.marshalling import Variant
from corral.kernel.privilege import is_hosts_root
from corral.oci.limits import limits_of
from corral.oci.spec import Spec
from corral.runtime.annotations import annotated
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.state import Record

PREFIX = "corral"
"""Of the units of containers that do not name theirs."""
_NOBODY_LISTENS = frozenset((errno.ENOENT, errno.ECONNREFUSED))


def names_of(cgroups_path: str, container_id: str, *, user: bool) -> tuple[str, str]:
    """The slice and the scope that `slice:prefix:name` means. Raises CommandError for what is of another form.

    >>> names_of("machine.slice:libpod:8f3a", "8f3a", user=False)
    ('machine.slice', 'libpod-8f3a.scope')
    """
    parts = (cgroups_path or f":{PREFIX}:{container_id}").split(":")
    if len(parts) != 3:
        wanted = 'to be of format "slice:prefix:name" for systemd cgroups'
        raise CommandError(f"linux.cgroupsPath: expected {wanted}, got {cgroups_path!r} instead")
    slice_, prefix, name = parts
    if name.endswith(SLICE):
        raise CommandError(f"linux.cgroupsPath: {name!r} is a slice, which has no processes of its own")
    return slice_ or ("user.slice" if user else "system.slice"), f"{prefix}-{name}{SCOPE}"


class Scope:
    """The scope of a container that is being made."""

    def __init__(self, context: Context, record: Record, spec: Spec) -> None:
        """Find out what it is called and where its cgroup will be, and note both in the record."""
        user = is_user(context)
        self._slice, unit = names_of(spec.linux.cgroups_path, record.id, user=user)
        try:
            check_name(unit)
            path = f"{slice_path(self._slice)}/{unit}"
        except ValueError as e:
            raise CommandError(f"linux.cgroupsPath: {e}") from None
        self._annotated = annotated(spec.annotations)
        self._limits = limits_of(spec.linux.resources)
        if not is_hosts_root():
            self._limits = replace(self._limits, devices=None)  # see groups.make()
        self._manager = manager_for(user=user)
        self._holder: tuple[int, int] | None = None
        self._plan: list[Step] = []
        self._record = record
        record.unit, record.user_manager = unit, user
        record.cgroup = f"{self._manager.control_group if user else ''}{path}"

    def close(self) -> None:
        """Let go of it."""
        with contextlib.suppress(TimeoutError):  # it ends with this process
            self._end_holder()
        self._manager.close()

    def start(self) -> Cgroup:
        """Make it, with as many of the limits as init can be born under."""
        record, driver = self._record, Driver(detect(), lenient=True)
        if record.user_manager:
            come_near(record)
        self._holder = _hold()
        self._manager.start_scope(record.unit, self._slice, self._holder[0], self._properties_of(driver.layout))
        try:
            group = driver.create(record.cgroup, adopt=True)
            driver.enable(record.cgroup, self._limits)
            self._plan = scopes.plan(group, self._limits)
            steps.run([step for step in self._plan if not scopes.counts_processes(step)], undo=False)
        except BaseException:
            with contextlib.suppress(TimeoutError):
                self._end_holder()
            self._manager.stop(record.unit)
            driver.open(record.cgroup).remove()  # on v1, where systemd does not know all hierarchies
            raise
        return group

    def settle(self) -> None:
        """Init is in it: what made room for it ends, and systemd is told of the limits."""
        self._end_holder()
        tell = scopes.Tell(self._manager, self._record.unit, self._plan)
        steps.run([*filter(scopes.counts_processes, self._plan), tell], undo=False)
        self.close()

    def _properties_of(self, layout: Layout) -> list[Property]:
        """What is said of it when it is made. Of the same property the last one counts."""
        return [
            ("Description", Variant("s", f"corral-oci container {self._record.id}")),
            *scopes.accounting(layout),
            *self._annotated,
            *scopes.told_at_start(self._limits, layout, self._manager.version),
        ]

    def _end_holder(self) -> None:
        if self._holder is not None:
            (_, pidfd), self._holder = self._holder, None
            scopes.end_holder(pidfd, self._record.cgroup)


def _hold() -> tuple[int, int]:
    """A process that does nothing, and ends with the caller: its pid and pidfd."""
    parent = os.getpid()
    pid, pidfd = process.clone(0)
    if pid == 0:
        with contextlib.suppress(BaseException):
            process.close_fds([])  # with them goes the lock of the container's state
            process.set_parent_death_signal(signal.SIGKILL)
            while os.getppid() == parent:
                signal.pause()
        os._exit(0)
    return pid, pidfd


def update(record: Record, group: Cgroup, changes: Resources) -> None:
    """Change the limits of a container: all of those asked for, or none, but for devices, which come last."""
    with contextlib.closing(manager_for(user=record.user_manager)) as manager:
        scopes.change(group, manager, record.unit, changes, detect())


def remove(record: Record) -> None:
    """Remove a container's scope with whatever is left in it."""
    group = Driver(detect()).open(record.cgroup)
    group.kill()
    if (manager := _reached(record)) is not None:
        with contextlib.closing(manager):
            manager.stop(record.unit)
    group.remove()


def forget(record: Record) -> None:
    """Remove what a create that was killed may have asked for, unless somebody is in it: that is another container's.

    A scope ends with its last process, unless that died before systemd had it under its eyes.
    """
    empty = not Driver(detect()).open(record.cgroup).pids()
    if (manager := _reached(record)) is not None:
        with contextlib.closing(manager):
            (manager.stop if empty else manager.reset)(record.unit)


def _reached(record: Record) -> Manager | None:
    """The systemd that a scope is of. None if it does not run any more: a user's ends with the user's last session."""
    try:
        return manager_for(user=record.user_manager)
    except Gone:
        return None


def is_user(context: Context) -> bool:
    """Whether it is the caller's own systemd that makes the scope: where the host's is out of reach."""
    return context.rootless and not os.access(PRIVATE, os.W_OK)


class Gone(CommandError):
    """There is no systemd. One that only can't be reached now still has its scopes."""


def manager_for(*, user: bool) -> Manager:
    """A connection to systemd. Raises CommandError that tells what to do without, Gone if there is none."""
    remedy = "leave --systemd-cgroup out, or have the engine use cgroupfs"
    if not os.path.isdir(BOOTED):  # noqa: PTH112 - a string, as everywhere here
        raise Gone(f"systemd does not run this host, so it makes no cgroups: {remedy}")
    try:
        return Manager.open(user=user)
    except OSError as e:
        whose = "the user's systemd (is dbus-user-session installed, and $XDG_RUNTIME_DIR set?)" if user else "systemd"
        kind = Gone if user and e.errno in _NOBODY_LISTENS else CommandError
        where = f": {e.filename}" if e.filename else ""
        raise kind(f"cannot reach {whose}: {e.strerror}{where}; {remedy}") from e


def come_near(record: Record) -> None:
    """Be where a process can be born in the cgroup of a container of a user's own systemd.

    The kernel asks for the right to both cgroups, and to the one above both, which between a login session and the
    user's systemd is the host's. So, as podman does, this process becomes a scope of that systemd.
    """
    driver = Driver(detect())
    unified = driver.layout.unified
    if unified is None:
        return
    own = path_in_v2(os.getpid())
    above = os.path.commonpath([own or "/", record.cgroup])
    if os.access(f"{unified.mount_point}{above}/cgroup.procs", os.W_OK):
        return
    with contextlib.closing(manager_for(user=True)) as manager:
        manager.start_scope(f"corral-oci-{os.getpid()}{SCOPE}", "user.slice", os.getpid())
