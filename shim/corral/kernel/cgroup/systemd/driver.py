"""The driver of a host whose cgroups systemd makes: those of containers are scopes, below slices.

    create   the scope, around a process of ours that only holds it       see corral.kernel.cgroup.systemd.scopes
    settle   a process of the container is in it: the other one ends, and all limits hold
    apply    limits are written to the files, and systemd is told
             the last process ends: systemd removes the scope and its cgroup       see ...systemd.removal
    remove   what is left is killed, and the unit stopped, with the slice that it may have of its own

The holder ends with this process, so what a crash leaves without a container ends by itself. A cgroup that is neither a
scope nor a slice is as any other.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from corral.kernel.cgroup import steps
from corral.kernel.cgroup.driver import Driver, check_path
from corral.kernel.cgroup.group import Cgroup
from corral.kernel.cgroup.layout import Hierarchy, Layout
from corral.kernel.cgroup.resources import Resources
from corral.kernel.cgroup.systemd import scopes
from corral.kernel.cgroup.systemd.manager import BOOTED, Manager
from corral.kernel.cgroup.systemd.names import ROOT, SCOPE, has_slice_of_its_own, unit_at
from corral.kernel.cgroup.systemd.properties import INFINITY
from corral.kernel.dbus.marshalling import Variant

_ATTEMPTS = 5
"""On v1 systemd removes, a moment later, a slice's directories of controllers that it does not need itself."""
_HOLDER = ["cat"]
"""It reads until its input ends, and that is a pipe of which this process alone has the other end."""
_OPERATION_S = 30.0
"""For systemd to do all that one operation takes."""
_COME_S = 2.0
"""For containers that are on their way to scopes which are held, when the driver is closed."""


class SystemdDriver(Driver):
    """See the module."""

    asks_systemd = True

    def __init__(self, layout: Layout) -> None:
        """Raises OSError if systemd does not run this host, or can't be reached."""
        super().__init__(layout)
        self._holders = _Holders()
        if not os.path.isdir(BOOTED):  # noqa: PTH112 - a string, as everywhere here
            raise OSError(errno.ENOENT, "systemd is not pid 1 of this host", BOOTED)
        with _systemd():
            pass

    def _group(self, path: str) -> Cgroup:
        return UnitCgroup(path, self._hierarchies, self.layout, self._holders)

    def create(
        self,
        path: str,
        resources: Resources | None = None,
        *,
        adopt: bool = False,
        on_orphan: Callable[[], object] = lambda: None,
    ) -> Cgroup:
        """Make a cgroup with its limits, a scope if its name says so. Raises OSError, see Driver."""
        unit = unit_at(path)
        if not unit.endswith(SCOPE):
            return super().create(path, resources, adopt=adopt, on_orphan=on_orphan)
        check_path(path)
        slice_ = path.split("/")[-2] or ROOT
        group, limits = self._group(path), resources or Resources()
        with _systemd() as manager:
            where = manager.cgroup_of(unit)
            if where or group.exists():
                raise OSError(errno.EEXIST, f"there is such a scope at {where or path}", path)
            try:
                if has_slice_of_its_own(path):
                    manager.start_slice(slice_, scopes.accounting(self.layout))
                self._start(manager, unit, slice_, self._holders.hold(path), limits)
                super().create(path, adopt=True)
                self.enable(path, limits)
                planned = scopes.plan(group, limits)
                steps.run([step for step in planned if not scopes.counts_processes(step)], undo=False)
            except BaseException:
                with contextlib.suppress(OSError):
                    group.remove()
                raise
        return group

    def _start(self, manager: Manager, unit: str, slice_: str, pid: int, limits: Resources) -> None:
        told = [
            ("Description", Variant("s", f"corral container {unit.removesuffix(SCOPE)}")),
            ("CollectMode", Variant("s", "inactive-or-failed")),  # nobody is left to say that it may go
            ("TasksMax", Variant("t", INFINITY)),  # until there is a limit: systemd has a default
            *scopes.accounting(self.layout),
            *scopes.told_at_start(limits, self.layout, manager.version),
        ]
        manager.start_scope(unit, slice_, pid, told)

    def settle(self, path: str, limits: Resources) -> None:
        """A process of the container is in it, so it is held no longer, and systemd is told of the limits.

        They are all those that it has. The same again does no harm, nor does it if the container has ended meanwhile.
        Raises OSError: ENOENT if there are processes, and systemd knows nothing of them.
        """
        if not unit_at(path).endswith(SCOPE):
            return
        with _systemd() as manager:
            self._settle(manager, path, limits)

    def settle_all(self, wanted: Mapping[str, Resources]) -> dict[str, OSError]:
        """As Driver does. A systemd that does not answer is not waited for again: those that are left fail, too."""
        left = [path for path in wanted if unit_at(path).endswith(SCOPE)]
        failed: dict[str, OSError] = {}
        if not left:
            return failed
        try:
            with contextlib.closing(Manager.open(user=False)) as manager:
                while left:
                    try:
                        self._settle(manager, left[0], wanted[left[0]])
                    except OSError as e:
                        if isinstance(e, TimeoutError | ConnectionError):
                            raise
                        failed[left[0]] = e
                    left.pop(0)
        except OSError as e:
            failed |= dict.fromkeys(left, e)
        return failed

    def _settle(self, manager: Manager, path: str, limits: Resources) -> None:
        self._holders.release(path)
        group, unit = self.open(path), unit_at(path)
        if manager.cgroup_of(unit) == path:
            scopes.settle(group, manager, unit, limits, self.layout)
        elif group.pids():
            group.apply(limits)
            raise OSError(errno.ENOENT, "systemd has lost this scope, with processes in it", path)

    def close(self) -> None:
        """End the holders: when a container's process has come, or none does so in time."""
        deadline = time.monotonic() + _COME_S
        for path, pid in self._holders.held():
            while set(self.open(path).pids()) <= {pid} and time.monotonic() < deadline:
                time.sleep(0.02)
            with contextlib.suppress(OSError):  # one that does not end goes with this process
                self._holders.release(path)

    def claim(self, path: str, owner: str, lives: Callable[[str], bool] = lambda _: False) -> str:
        """As Driver does, of a slice."""
        with _systemd() as manager:
            manager.start_slice(path.rpartition("/")[2], scopes.accounting(self.layout))
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return super().claim(path, owner, lives)
        raise OSError(errno.ENOENT, "it keeps vanishing", path)

    def prune(self, path: str) -> None:
        """Stop a slice if nothing is below."""
        if self.list(path):
            return
        _stop_slice(self.open(path))


class UnitCgroup(Cgroup):
    """A cgroup that may be a unit's."""

    __slots__ = ("_holders", "_layout", "_unit")

    def __init__(self, path: str, hierarchies: Sequence[Hierarchy], layout: Layout, holders: "_Holders") -> None:
        super().__init__(path, hierarchies)
        self._unit = unit_at(path)
        self._layout, self._holders = layout, holders

    def apply(self, wanted: Resources, *, fresh: bool = False) -> None:
        """As Cgroup does; systemd is told. Raises OSError."""
        if self._unit and not fresh:
            with _systemd() as manager:
                if manager.cgroup_of(self._unit) == self.path:
                    scopes.change(self, manager, self._unit, wanted, self._layout)
                    return
        super().apply(wanted, fresh=fresh)

    def lift_memory_limit(self) -> None:
        """As Cgroup does; systemd is told."""
        super().lift_memory_limit()
        if self._unit:
            with _systemd() as manager:
                if manager.cgroup_of(self._unit) == self.path:
                    hierarchy = self._layout.of("memory")
                    name = "MemoryLimit" if hierarchy is not None and hierarchy.version == 1 else "MemoryMax"
                    manager.set_properties(self._unit, [(name, Variant("t", INFINITY))])

    def is_lasting(self) -> bool:
        """A scope in which nobody is goes by itself, if not at once: it is removed here."""
        if self._unit.endswith(SCOPE) and not self.pids():
            self._remove_unit(10.0)
            return False
        return super().is_lasting()

    def keeps_counts(self) -> bool:
        """As Cgroup does; a slice of its own keeps them."""
        return super().keeps_counts() or (has_slice_of_its_own(self.path) and self._slice().exists())

    def _slice(self) -> Cgroup:
        return Cgroup(self.path.rpartition("/")[0], self._hierarchies)

    def remove(self, timeout_s: float = 10.0) -> None:
        """As Cgroup does, with its unit, and the slice if that is its own."""
        self._remove_unit(timeout_s)
        if has_slice_of_its_own(self.path):
            _stop_slice(self._slice())

    def _remove_unit(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):  # it is frozen, say
            self._holders.release(self.path)
        super().remove(timeout_s)
        self._holders.release(self.path)
        if self._unit:
            with _systemd() as manager:
                if manager.cgroup_of(self._unit) in (self.path, ""):  # not one that another has elsewhere
                    manager.stop(self._unit)


class _Holder(NamedTuple):
    pid: int
    pidfd: int
    pipe: int


class _Holders:
    """Processes that hold scopes, by the path of the cgroup."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, _Holder] = {}

    def hold(self, path: str) -> int:
        """Start one; returns its pid."""
        theirs, ours = os.pipe()
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        try:
            actions = [(os.POSIX_SPAWN_DUP2, theirs, 0), *null]
            pid = os.posix_spawnp(_HOLDER[0], _HOLDER, {}, file_actions=actions, setsid=True)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        with self._lock:
            self._held[path] = _Holder(pid, os.pidfd_open(pid), ours)
        return pid

    def held(self) -> list[tuple[str, int]]:
        """Those paths, and the holders' pids."""
        with self._lock:
            return [(path, holder.pid) for path, holder in self._held.items()]

    def release(self, path: str) -> None:
        """End one, and wait for its end; no error if there is none. Raises TimeoutError; then it is held still."""
        with self._lock:
            holder = self._held.get(path)
        if holder is None:
            return
        scopes.end_holder(holder.pidfd, path)
        with self._lock:
            del self._held[path]
        os.close(holder.pipe)


def _stop_slice(group: Cgroup) -> None:
    with _systemd() as manager:
        manager.stop(group.path.rpartition("/")[2])
    for directory in group.directories:  # of v1, those that systemd does not know
        with contextlib.suppress(OSError):
            os.rmdir(directory)  # noqa: PTH106 - a string, as everywhere here


@contextlib.contextmanager
def _systemd() -> Iterator[Manager]:
    """Connected, for one operation. Raises TimeoutError in it when that has taken too long altogether."""
    with contextlib.closing(Manager.open(user=False, within_s=_OPERATION_S)) as manager:
        yield manager
