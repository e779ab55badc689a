"""From limits to steps: which planner answers for which limit, in which version. A table, and its one reader."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from corral.kernel.cgroup import pids, rdma, steps
from corral.kernel.cgroup.resources import CpuLimits, IoLimits, MemoryLimits, PidsLimits, Resources
from corral.kernel.cgroup.steps import Step, Write
from corral.kernel.cgroup.v1 import blkio, cpuset
from corral.kernel.cgroup.v1 import cpu as cpu_v1
from corral.kernel.cgroup.v1 import devices as devices_v1
from corral.kernel.cgroup.v1 import hugetlb as hugetlb_v1
from corral.kernel.cgroup.v1 import memory as memory_v1
from corral.kernel.cgroup.v2 import cpu as cpu_v2
from corral.kernel.cgroup.v2 import cpuset as cpuset_v2
from corral.kernel.cgroup.v2 import devices as devices_v2
from corral.kernel.cgroup.v2 import hugetlb as hugetlb_v2
from corral.kernel.cgroup.v2 import io
from corral.kernel.cgroup.v2 import memory as memory_v2

type Planner = Callable[[str, Resources], list[Step]]
type Directories = Mapping[str, tuple[str, int]]
"""Controller name to the cgroup's directory and the version of its hierarchy."""

UNIFIED = "unified"
"""In Directories: the v2 directory, whatever controllers it has."""

_NO_CPU, _NO_MEMORY, _NO_PIDS, _NO_IO = CpuLimits(), MemoryLimits(), PidsLimits(), IoLimits()
_RAW_KEY = re.compile(r"([a-z]+)\.[a-z0-9_.]+")


@dataclass(frozen=True, slots=True)
class _Part:
    controller: str
    asked: Callable[[Resources], bool]
    v1: Planner
    v2: Planner


_PARTS = (
    _Part(
        "cpu",
        lambda r: r.cpu != _NO_CPU and replace(r.cpu, cpus=None, mems=None) != _NO_CPU,
        lambda d, r: cpu_v1.plan(d, r.cpu),
        lambda d, r: cpu_v2.plan(d, r.cpu),
    ),
    _Part(
        "cpuset",
        lambda r: bool(r.cpu.cpus or r.cpu.mems),
        lambda d, r: cpuset.plan(d, r.cpu),
        lambda d, r: cpuset_v2.plan(d, r.cpu),
    ),
    _Part(
        "memory",
        lambda r: r.memory != _NO_MEMORY,
        lambda d, r: memory_v1.plan(d, r.memory),
        lambda d, r: memory_v2.plan(d, r.memory),
    ),
    _Part(
        "pids",
        lambda r: r.pids != _NO_PIDS,
        lambda d, r: pids.plan(d, r.pids),
        lambda d, r: pids.plan(d, r.pids),
    ),
    _Part(
        "blkio",
        lambda r: r.io != _NO_IO,
        lambda d, r: blkio.plan(d, r.io),
        lambda d, r: io.plan(d, r.io),
    ),
    _Part(
        "hugetlb",
        lambda r: bool(r.hugetlb),
        lambda d, r: hugetlb_v1.plan(d, r.hugetlb),
        lambda d, r: hugetlb_v2.plan(d, r.hugetlb),
    ),
    _Part(
        "rdma",
        lambda r: bool(r.rdma),
        lambda d, r: rdma.plan(d, r.rdma),
        lambda d, r: rdma.plan(d, r.rdma),
    ),
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
            planned += (part.v1 if version == 1 else part.v2)(directory, wanted)
    planned += [_raw(path, where, name, value) for name, value in wanted.unified.items()]
    if wanted.devices is None:
        return planned
    # Last of all: a device program on v2 has no undo.
    if "devices" in where:
        planner = devices_v1.plan_fresh if fresh else devices_v1.plan
        return planned + planner(where["devices"][0], wanted.devices)
    if UNIFIED in where:
        return planned + devices_v2.plan(where[UNIFIED][0], wanted.devices)
    raise steps.unsupported(path, "this host has neither the cgroup controller 'devices' nor cgroup v2")


def _raw(path: str, where: Directories, name: str, value: str) -> Step:
    match = _RAW_KEY.fullmatch(name)
    if match is None or match[1] == "cgroup":
        raise steps.invalid(path, f"{name!r} is not the name of a controller's file")
    controller = {"io": "blkio"}.get(match[1], match[1])
    directory, version = where.get(controller, ("", 0))
    if version != 2:
        raise steps.unsupported(path, f"{name}: controller {match[1]!r} is not in cgroup v2 on this host")
    return Write(f"{directory}/{name}", value)
