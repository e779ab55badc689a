"""Which cgroup hierarchies this host has mounted, found from /proc/self/mountinfo alone.

    v2      one cgroup2 mount holds every controller
    v1      one mount per controller (or per group of them), no cgroup2
    hybrid  v1 mounts, and a cgroup2 mount that may hold the controllers no v1 mount took

Source: proc_pid_mountinfo(5); kernel cgroup-v2.rst "Mounting".
"""

import enum
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from corral.kernel.cgroup import files

MOUNTINFO = "/proc/self/mountinfo"
CONTROLLERS_FILE = "cgroup.controllers"

V1_CONTROLLERS = frozenset(
    {"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory"}
    | {"misc", "net_cls", "net_prio", "perf_event", "pids", "rdma"}
)
_V2_NAMES = {"blkio": "io", "cpuacct": "cpu"}
"""Controllers that v2 renamed or folded into another."""


class Kind(enum.Enum):
    """The three ways a host can mount cgroups."""

    V1 = "v1"
    V2 = "v2"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted cgroup tree."""

    version: int
    mount_point: str
    controllers: frozenset[str]
    name: str = ""
    """Of a v1 hierarchy mounted with `name=`, such as systemd's; such a one has no controllers."""
    read_only: bool = False
    nsdelegate: bool = False
    """Of v2: who is in a cgroup namespace cannot change the limits of its root."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Every hierarchy of a host, v1 ones first."""

    kind: Kind
    hierarchies: tuple[Hierarchy, ...]

    def of(self, controller: str) -> Hierarchy | None:
        """The hierarchy that holds a controller, by its v1 or v2 name (blkio finds io); None if none does."""
        for hierarchy in self.hierarchies:
            name = controller if hierarchy.version == 1 else _V2_NAMES.get(controller, controller)
            if name in hierarchy.controllers:
                return hierarchy
        return None

    @property
    def unified(self) -> Hierarchy | None:
        """The cgroup2 hierarchy, with or without controllers."""
        return next((h for h in self.hierarchies if h.version == 2), None)


def detect() -> Layout:
    """The layout of this process's mount namespace.

    Raises OSError(ENOENT) when no cgroup file system is mounted at all.
    """
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
        layout = parse(file.read(), v2_controllers=_enabled)
    if not layout.hierarchies:
        remedy = "mount -t cgroup2 cgroup2 /sys/fs/cgroup"
        raise OSError(errno.ENOENT, f"no cgroup file system is mounted: {remedy}", MOUNTINFO)
    return layout


def _enabled(mount_point: str) -> frozenset[str]:
    return frozenset(files.read(f"{mount_point}/{CONTROLLERS_FILE}").split())


def parse(mountinfo: str, v2_controllers: Callable[[str], frozenset[str]]) -> Layout:
    """The layout that a mountinfo text describes; v2_controllers tells a cgroup2 mount point's own.

    Of several mounts of one hierarchy the writable one of the whole tree wins, then the first.
    """
    best: dict[object, tuple[int, Hierarchy]] = {}
    for hierarchy, whole in _mounts(mountinfo):
        key = (hierarchy.controllers or hierarchy.name) if hierarchy.version == 1 else 2
        rank = 2 * hierarchy.read_only + (not whole)
        if key not in best or rank < best[key][0]:
            best[key] = (rank, hierarchy)
    v1 = [h for _, h in best.values() if h.version == 1]
    v2 = [replace(h, controllers=v2_controllers(h.mount_point)) for _, h in best.values() if h.version == 2]
    kind = Kind.V2 if v2 and not any(h.controllers for h in v1) else Kind.HYBRID if v2 else Kind.V1
    return Layout(kind, (*v1, *v2))


def _mounts(mountinfo: str) -> Iterator[tuple[Hierarchy, bool]]:
    """Each cgroup mount, and whether it shows its hierarchy from the root on."""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, (fstype, *rest) = left.split(), right.split() or [""]
        if fstype not in ("cgroup", "cgroup2") or len(rest) < 2 or len(fields) < 6:
            continue
        options = rest[1].split(",")
        read_only = "ro" in fields[5].split(",") or "ro" in options
        mount_point, whole = _unescape(fields[4]), fields[3] == "/"
        if fstype == "cgroup2":
            hierarchy = Hierarchy(2, mount_point, frozenset(), read_only=read_only, nsdelegate="nsdelegate" in options)
            yield hierarchy, whole
        else:
            name = next((o.removeprefix("name=") for o in options if o.startswith("name=")), "")
            yield Hierarchy(1, mount_point, V1_CONTROLLERS & set(options), name, read_only), whole


def _unescape(path: str) -> str:
    """Every backslash begins an escape of three octal digits."""
    head, *rest = path.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)
