"""From limits to steps: which planner answers for which limit, in which version. A table, and its one reader."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module

from corral.kernel.cgroup import steps
from corral.kernel.cgroup.resources import CpuLimits, IoLimits, MemoryLimits, PidsLimits, Resources
from corral.kernel.cgroup.steps import Step, Write

type Planner = Callable[[str, Resources, bool], list[Step]]
type Directories = Mapping[str, tuple[str, int]]
"""Controller name to the cgroup's directory and the version of its hierarchy."""

UNIFIED = "unified"
"""In Directories: the v2 directory, whatever controllers it has."""

_NO_CPU, _NO_MEMORY, _NO_PIDS, _NO_IO = CpuLimits(), MemoryLimits(), PidsLimits(), IoLimits()
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
_IN_NAMES = _LETTERS | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")
"""With the capitals of hugetlb.2MB.max."""
_TYPE, _PARTITION = "cgroup.type", "cpuset.cpus.partition"


@dataclass(frozen=True, slots=True)
class _Part:
    controller: str
    asked: Callable[[Resources], bool]
    v1: Planner
    v2: Planner


def _of(module: str, part: Callable[[Resources], object], *, depends: bool = False) -> Planner:
    """The planner of a module that is loaded once there is a limit for it: most containers have few.

    depends: its steps depend on what the cgroup has now, so it wants to know if that was just made, and has nothing.
    """

    def plan(directory: str, wanted: Resources, fresh: bool) -> list[Step]:
        planner: Callable[..., list[Step]] = import_module(f"corral.kernel.cgroup.{module}").plan
        return planner(directory, part(wanted), fresh=fresh) if depends else planner(directory, part(wanted))

    return plan


_NET_CLS, _NET_PRIO = _of("v1.net_cls", lambda r: r.network), _of("v1.net_prio", lambda r: r.network)
_PARTS = (
    _Part(
        "cpu",
        lambda r: r.cpu != _NO_CPU and replace(r.cpu, cpus=None, mems=None) != _NO_CPU,
        _of("v1.cpu", lambda r: r.cpu, depends=True),
        _of("v2.cpu", lambda r: r.cpu),
    ),
    _Part(
        "cpuset",
        lambda r: bool(r.cpu.cpus or r.cpu.mems),
        _of("v1.cpuset", lambda r: r.cpu),
        _of("v2.cpuset", lambda r: r.cpu),
    ),
    _Part(
        "memory",
        lambda r: r.memory != _NO_MEMORY,
        _of("v1.memory", lambda r: r.memory, depends=True),
        _of("v2.memory", lambda r: r.memory),
    ),
    _Part("pids", lambda r: r.pids != _NO_PIDS, _of("pids", lambda r: r.pids), _of("pids", lambda r: r.pids)),
    _Part("blkio", lambda r: r.io != _NO_IO, _of("v1.blkio", lambda r: r.io), _of("v2.io", lambda r: r.io)),
    _Part(
        "hugetlb",
        lambda r: bool(r.hugetlb),
        _of("v1.hugetlb", lambda r: r.hugetlb),
        _of("v2.hugetlb", lambda r: r.hugetlb),
    ),
    _Part("rdma", lambda r: bool(r.rdma), _of("rdma", lambda r: r.rdma), _of("rdma", lambda r: r.rdma)),
    _Part("net_cls", lambda r: r.network.class_id is not None, _NET_CLS, _NET_CLS),
    _Part("net_prio", lambda r: bool(r.network.priorities), _NET_PRIO, _NET_PRIO),
)


def plan(path: str, where: Directories, wanted: Resources, *, fresh: bool = False) -> list[Step]:
    """Every step that the limits need, with nothing changed yet. fresh: the cgroup was just made.

    Raises OSError: EOPNOTSUPP if a controller is not here, EINVAL for a value that no kernel takes.
    """
    planned: list[Step] = []
    for part in _PARTS:
        if part.asked(wanted):
            if part.controller not in where:
                raise steps.unsupported(path, f"this host has no cgroup controller {part.controller!r}")
            directory, version = where[part.controller]
            planned += (part.v1 if version == 1 else part.v2)(directory, wanted, fresh)
    planned += [_raw(path, where, name, value) for name, value in wanted.unified.items()]
    if wanted.devices is None:
        return planned
    # Last of all: a device program on v2 has no undo.
    if "devices" in where:
        from corral.kernel.cgroup.v1 import devices as devices_v1

        planner = devices_v1.plan_fresh if fresh else devices_v1.plan
        return planned + planner(where["devices"][0], wanted.devices)
    if UNIFIED in where:
        from corral.kernel.cgroup.v2 import devices as devices_v2

        return planned + devices_v2.plan(where[UNIFIED][0], wanted.devices)
    raise steps.unsupported(path, "this host has neither the cgroup controller 'devices' nor cgroup v2")


def limited_by(wanted: Resources) -> list[str]:
    """What there are limits of, by the v1 name of the controller, or the name of a file of v2; devices are none."""
    return [*(part.controller for part in _PARTS if part.asked(wanted)), *wanted.unified]


def _raw(path: str, where: Directories, name: str, value: str) -> Step:
    owner, _, rest = name.partition(".")
    if name == _TYPE:
        why = "a threaded cgroup can have no limits of memory and I/O, and no process can begin in it"
        raise steps.unsupported(path, f"{name}: {why}")
    if not owner or not rest or not _LETTERS.issuperset(owner) or not _IN_NAMES.issuperset(rest) or owner == "cgroup":
        raise steps.invalid(path, f"{name!r} is not the name of a controller's file")
    controller = {"io": "blkio"}.get(owner, owner)
    directory, version = where.get(controller, ("", 0))
    if version != 2:
        why = f"controller {owner!r} is not in cgroup v2 on this host"
        raise steps.unsupported(path, f"invalid configuration: {name}: {why}")
    if name == _PARTITION:
        from corral.kernel.cgroup.v2.cpuset import Partition

        return Partition(f"{directory}/{name}", value)
    return Write(f"{directory}/{name}", value)
