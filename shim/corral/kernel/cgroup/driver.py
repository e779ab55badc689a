"""The driver: cgroups in every hierarchy at once, on v1, v2 and hybrid hosts.

A cgroup is named by one path, "/corral/default/web", and is a directory of that path below the root of each mounted
hierarchy. On a host like this (v1 for most, v2 for the rest) that makes

    /sys/fs/cgroup/memory/corral/default/web     one per v1 hierarchy, named ones (systemd) included
    /sys/fs/cgroup/unified/corral/default/web    the v2 one: cgroup.kill, cgroup.freeze and pressure, if nothing else

A life:  create(path) -> apply(limits) -> a process joins paths() -> read(), freeze(), thaw(), kill() -> remove().

Nothing here ever looks at the caller's own cgroup or changes a directory above the paths it was given, except for
turning on v2 controllers on the way down to them.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Mapping

from corral.kernel.cgroup import files, steps
from corral.kernel.cgroup.group import SUBTREE_CONTROL, Cgroup
from corral.kernel.cgroup.layout import Hierarchy, Layout
from corral.kernel.cgroup.recipes import Recipes
from corral.kernel.cgroup.resources import CpuLimits, Resources
from corral.kernel.cgroup.v1 import cpuset

CONTROLLERS = "cgroup.controllers"
TYPE = "cgroup.type"

V2_CONTROLLERS = frozenset({"cpu", "cpuset", "io", "memory", "pids"})
"""Turned on for every cgroup of ours; any other when a limit asks for it."""

OWNER = "trusted.corral.owner"

_INVALID = "domain invalid"
_THREADED = "its parent, or one above, is for threads, so no process can begin in it: choose another parent"
_ATTEMPTS = 5
_NOT_OURS = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY))
"""Whose cgroup belongs to another, or has processes of another in it."""


class Driver:
    """Makes, opens and lists cgroups. Knows nothing of those that there are: the kernel is the truth."""

    asks_systemd = False
    """Whether systemd makes them, which may keep the caller waiting."""

    def __init__(self, layout: Layout, *, lenient: bool = False) -> None:
        """Use the writable hierarchies of a layout.

        lenient: a v2 controller that can't be turned on stays off, and only a limit that takes it fails.
        """
        self.layout = layout
        self._lenient = lenient
        self._hierarchies = tuple(h for h in layout.hierarchies if not h.read_only)
        self._recipes = Recipes()

    def create(
        self,
        path: str,
        resources: Resources | None = None,
        *,
        adopt: bool = False,
        on_orphan: Callable[[], object] = lambda: None,
    ) -> Cgroup:
        """Make a cgroup with its limits; all or nothing. adopt: what is there already is taken over.

        on_orphan: called if a parent is missing, before it is made.
        Raises OSError: EEXIST if it is there already; EINVAL and the like, naming file and value, for a limit that
        the kernel refuses; EOPNOTSUPP for one that this host cannot give.
        """
        check_path(path)
        group = self._group(path)
        made: list[str] = []
        try:
            for hierarchy, directory in zip(self._hierarchies, group.directories, strict=True):
                try:
                    self._make(hierarchy, path, directory, on_orphan)
                except FileExistsError:
                    if not adopt:
                        raise
                else:
                    made.append(directory)
            if resources is not None:
                self.enable(path, resources)
                if adopt:
                    group.apply(resources)
                else:
                    self._recipes.apply(group, resources)
        except BaseException:
            for directory in reversed(made):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)  # noqa: PTH106 - see _make()
            raise
        return group

    def open(self, path: str) -> Cgroup:
        """A cgroup that was made earlier; it may be there in part, or gone."""
        check_path(path)
        return self._group(path)

    def _group(self, path: str) -> Cgroup:
        return Cgroup(path, self._hierarchies)

    def list(self, parent: str) -> set[str]:
        """The names of the cgroups right below a path, in any hierarchy."""
        check_path(parent)
        names: set[str] = set()
        for hierarchy in self._hierarchies:
            with contextlib.suppress(FileNotFoundError):
                entries = os.scandir(f"{hierarchy.mount_point}{parent}")
                names.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        return names

    def settle(self, path: str, limits: Resources) -> None:
        """The first process is in a cgroup that was made with these limits: nothing is to be done, as it is whole."""

    def settle_all(self, wanted: Mapping[str, Resources]) -> dict[str, OSError]:
        """settle() of many, by path; returns what each fails with that does."""
        return {}

    def close(self) -> None:
        """Let go of what it holds in this process: nothing."""

    def claim(self, path: str, owner: str, lives: Callable[[str], bool] = lambda _: False) -> str:
        """Make a cgroup, or find it, and mark it as owner's; returns whose it is.

        A mark that another left holds while that one lives, and as long as there is anything below. It is an extended
        attribute of the cgroup in every hierarchy, and so goes with it, at the latest with the next boot.
        """
        check_path(path)
        for hierarchy in self._hierarchies:
            for ancestor in [*ancestors(path), path]:
                self._make_parent(hierarchy, ancestor)
        first, *rest = (f"{hierarchy.mount_point}{path}" for hierarchy in self._hierarchies)
        others = {_attribute(directory, OWNER) for directory in (first, *rest)} - {"", owner}
        for holder in sorted(others):
            if self.list(path) or lives(holder):
                return holder
        with contextlib.suppress(FileExistsError):  # of two that come at once, to a cgroup of nobody's, one is first
            _set_attribute(first, OWNER, owner, 0 if others else os.XATTR_CREATE)
        if (holder := _attribute(first, OWNER) or owner) != owner:
            return holder
        for directory in rest:
            _set_attribute(directory, OWNER, owner)
        return owner

    def mark(self, path: str, name: str, value: str) -> None:
        """Write an extended attribute of a cgroup, where there can be any; it goes with the cgroup."""
        _set_attribute(self._first(path), name, value)

    def marked(self, path: str, name: str) -> str:
        """What mark() wrote, "" if nothing."""
        return _attribute(self._first(path), name)

    def _first(self, path: str) -> str:
        check_path(path)
        return f"{self._hierarchies[0].mount_point}{path}"

    def prune(self, path: str) -> None:
        """Remove a cgroup and its ancestors as far as they are empty: no processes, nothing below."""
        check_path(path)
        for hierarchy in self._hierarchies:
            at = path
            while at:
                try:
                    os.rmdir(f"{hierarchy.mount_point}{at}")  # noqa: PTH106 - see _make()
                except FileNotFoundError:
                    pass
                except OSError:
                    break
                at = _parent(at)

    def enable(self, path: str, resources: Resources) -> None:
        """Turn on the v2 controllers of a cgroup that only some limits need."""
        unified = self.layout.unified
        if unified is None or unified.read_only:
            return
        if not (resources.unified or resources.hugetlb or resources.rdma):
            return
        asked = {name.partition(".")[0] for name in resources.unified}
        asked |= {"hugetlb"} if resources.hugetlb else set()
        asked |= {"rdma"} if resources.rdma else set()
        if wanted := asked & unified.controllers - V2_CONTROLLERS:
            for ancestor in ancestors(path):
                self._enable(f"{unified.mount_point}{ancestor}", wanted)

    def make_room(self, top: str, path: str, wanted: CpuLimits) -> None:
        """Let the parents of a cgroup, from `top` down, have the real-time CPU time that it is to have, if this is v1.

        Raises OSError(EINVAL) if there is not so much left.
        """
        hierarchy = self.layout.of("cpu")
        asked = wanted.realtime_runtime_us, wanted.realtime_period_us
        if hierarchy is None or hierarchy.version == 2 or asked == (None, None):
            return
        from corral.kernel.cgroup.v1 import realtime

        parents = [parent for parent in ancestors(path) if f"{parent}/".startswith(f"{top}/")]
        for parent in parents:
            self._make_parent(hierarchy, parent)
        where = hierarchy.mount_point
        if os.path.exists(f"{where}{top}/{realtime.RUNTIME}"):  # noqa: PTH110 - a string
            realtime.make_room([f"{where}{parent}" for parent in parents], f"{where}{path}", wanted)

    def remove(self, path: str, timeout_s: float) -> None:
        """Cgroup.remove() of whatever is at a path, and free_room()."""
        self.free_room(path)
        self.open(path).remove(timeout_s)

    def free_room(self, path: str) -> None:
        """Have a cgroup that is about to go leave its real-time CPU time to those beside it, if this is v1.

        To the kernel it has that for as long as what was removed is taken apart: some tens of milliseconds.
        """
        hierarchy = self.layout.of("cpu")
        if hierarchy is None or hierarchy.version == 2:
            return
        from corral.kernel.cgroup.v1 import realtime

        with contextlib.suppress(OSError):  # it is gone, or what has yet to end runs by it
            files.write(f"{hierarchy.mount_point}{path}/{realtime.RUNTIME}", "0")

    def _make(self, hierarchy: Hierarchy, path: str, directory: str, on_orphan: Callable[[], object]) -> None:
        """One directory, and on the way the missing ones above it."""
        for _ in range(_ATTEMPTS):
            try:
                os.mkdir(directory, 0o755)  # noqa: PTH102 - ten for each container, and Path takes a tenth of the time
                break
            except FileNotFoundError:  # the parents were never made, or pruned by another a moment ago
                on_orphan()
                for ancestor in ancestors(path):
                    self._make_parent(hierarchy, ancestor)
        else:
            raise OSError(errno.ENOENT, "its parent keeps vanishing", directory)
        try:
            if hierarchy.version == 2:
                self._share(hierarchy, path)
            elif "cpuset" in hierarchy.controllers:
                cpuset.inherit(directory, _parent(directory))
        except BaseException:
            with contextlib.suppress(OSError):
                os.rmdir(directory)  # noqa: PTH106 - see above
            raise

    def _share(self, hierarchy: Hierarchy, path: str) -> None:
        """Turn on controllers for a cgroup whose parents another made, without them."""
        wanted = V2_CONTROLLERS & hierarchy.controllers
        directory = f"{hierarchy.mount_point}{path}"
        if wanted and wanted - set(files.read(f"{directory}/{CONTROLLERS}").split()):
            for ancestor in ancestors(path):
                self._enable(f"{hierarchy.mount_point}{ancestor}", wanted)
            if files.read(f"{directory}/{TYPE}") == _INVALID:
                raise steps.unsupported(directory, _THREADED)

    def _make_parent(self, hierarchy: Hierarchy, path: str) -> None:
        directory = f"{hierarchy.mount_point}{path}"
        if path:
            try:
                os.mkdir(directory, 0o755)  # noqa: PTH102 - see _make()
            except FileExistsError:
                pass
            else:
                if hierarchy.version == 1 and "cpuset" in hierarchy.controllers:
                    cpuset.inherit(directory, _parent(directory))
                    cpuset.bequeath(directory)
        if hierarchy.version == 2:
            self._enable(directory, V2_CONTROLLERS)

    def _enable(self, directory: str, wanted: frozenset[str] | set[str]) -> None:
        """Give the children of a v2 cgroup those wanted controllers that it has itself."""
        path = f"{directory}/{SUBTREE_CONTROL}"
        missing = (wanted & set(files.read(f"{directory}/{CONTROLLERS}").split())) - set(files.read(path).split())
        if not missing:
            return
        try:
            files.write(path, " ".join(f"+{name}" for name in sorted(missing)))
        except OSError as e:
            if self._lenient and e.errno in _NOT_OURS:
                return
            if e.errno == errno.EOPNOTSUPP:
                raise steps.unsupported(path, _THREADED) from e
            if e.errno != errno.EBUSY:
                raise
            why = "processes live in this cgroup, so it cannot share out controllers: move them to one below it"
            raise OSError(e.errno, why, path) from e


def open_driver(layout: Layout, name: str = "cgroupfs") -> Driver:
    """The driver for a layout, by who makes cgroups: `cgroupfs`, we ourselves, or `systemd`. Raises OSError."""
    if name == "systemd":
        from corral.kernel.cgroup.systemd.driver import SystemdDriver

        return SystemdDriver(layout)
    return Driver(layout)


def check_path(path: str) -> None:
    """Refuse anything but an absolute, normal path below the root. Raises OSError(EINVAL)."""
    if not path.startswith("/") or path == "/" or os.path.normpath(path) != path or "\n" in path:
        raise steps.invalid(path, "a cgroup path must be absolute, without . or .., and not the root")


def ancestors(path: str) -> list[str]:
    """The paths above one, from the root down, the root as "".

    >>> ancestors("/corral/default/web")
    ['', '/corral', '/corral/default']
    """
    parts = path.split("/")[1:-1]
    return ["", *("/" + "/".join(parts[: n + 1]) for n in range(len(parts)))]


def _attribute(directory: str, name: str) -> str:
    """An extended attribute, "" if there is none, or can be none."""
    try:
        return os.getxattr(directory, name).decode()
    except OSError as e:
        if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return ""


def _set_attribute(directory: str, name: str, value: str, flags: int = 0) -> None:
    try:
        os.setxattr(directory, name, value.encode(), flags)
    except OSError as e:
        if e.errno != errno.EOPNOTSUPP:
            raise


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
