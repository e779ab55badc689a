"""Every counter of a cgroup in one reading, from whichever hierarchies hold its controllers."""

from collections.abc import Callable
from dataclasses import replace

from corral.kernel.cgroup import pids
from corral.kernel.cgroup.files import UNLIMITED
from corral.kernel.cgroup.plans import UNIFIED, Directories
from corral.kernel.cgroup.stats import CpuStats, MemoryStats, Stats
from corral.kernel.cgroup.v1 import blkio, cpuacct
from corral.kernel.cgroup.v1 import cpu as cpu_v1
from corral.kernel.cgroup.v1 import hugetlb as hugetlb_v1
from corral.kernel.cgroup.v1 import memory as memory_v1
from corral.kernel.cgroup.v2 import cpu as cpu_v2
from corral.kernel.cgroup.v2 import hugetlb as hugetlb_v2
from corral.kernel.cgroup.v2 import io, pressure
from corral.kernel.cgroup.v2 import memory as memory_v2


def read(where: Directories) -> Stats:
    """One reading. Raises OSError(ENOENT or ENODEV) if the cgroup is gone."""
    return Stats(
        cpu=_cpu(where),
        memory=_memory(where),
        pids=_each(where, "pids", pids.read, pids.read),
        io=_each(where, "blkio", blkio.read, io.read) or (),
        hugetlb=_each(where, "hugetlb", hugetlb_v1.read, hugetlb_v2.read) or (),
        io_pressure=pressure.read(f"{where[UNIFIED][0]}/{pressure.IO}") if UNIFIED in where else None,
    )


def with_pressure_now(where: Directories, stats: Stats, *, of_cpu_alone: bool = False) -> Stats:
    """An older reading with the pressure of now; the very same one where that has not changed."""
    if UNIFIED not in where:
        return stats
    directory = where[UNIFIED][0]
    if stats.cpu and (now := pressure.read(f"{directory}/{pressure.CPU}")) != stats.cpu.pressure:
        stats = replace(stats, cpu=replace(stats.cpu, pressure=now))
    if of_cpu_alone:
        return stats
    if stats.memory and (now := pressure.read(f"{directory}/{pressure.MEMORY}")) != stats.memory.pressure:
        stats = replace(stats, memory=replace(stats.memory, pressure=now))
    if (now := pressure.read(f"{directory}/{pressure.IO}")) != stats.io_pressure:
        stats = replace(stats, io_pressure=now)
    return stats


def cpu_ns(where: Directories) -> int | None:
    """CPU time used so far; None where no controller counts it."""
    if "cpuacct" in where:
        return cpuacct.usage_ns(where["cpuacct"][0])
    return cpu_v2.read(where[UNIFIED][0]).usage_ns if UNIFIED in where else None


def cpus(where: Directories) -> float | None:
    """How many CPUs' time may be used; None without a quota, or a controller."""
    quota_us, period_us = _each(where, "cpu", cpu_v1.bandwidth, cpu_v2.bandwidth) or (UNLIMITED, 1)
    return None if quota_us == UNLIMITED else quota_us / period_us


def memory_limit(where: Directories) -> int:
    """Its own limit of memory in bytes; UNLIMITED without one, or a controller."""
    found = _each(where, "memory", memory_v1.limit, memory_v2.limit)
    return UNLIMITED if found is None else found


def pids_limit(where: Directories) -> int:
    """Its own limit of processes; UNLIMITED without one, or a controller."""
    found = _each(where, "pids", pids.limit, pids.limit)
    return UNLIMITED if found is None else found


def _cpu(where: Directories) -> CpuStats | None:
    """v1 counts time in cpuacct and throttling in cpu; a v2 cgroup counts time even without any controller."""
    throttled = _each(where, "cpu", cpu_v1.read, cpu_v2.read)
    if "cpuacct" in where:
        used: CpuStats | None = cpuacct.read(where["cpuacct"][0])
    elif UNIFIED in where:
        used = cpu_v2.read(where[UNIFIED][0])
    else:
        used = throttled
    if used is None:
        return None
    return CpuStats(
        used.usage_ns,
        used.user_ns,
        used.system_ns,
        periods=throttled.periods if throttled else 0,
        throttled_periods=throttled.throttled_periods if throttled else 0,
        throttled_ns=throttled.throttled_ns if throttled else 0,
        pressure=pressure.read(f"{where[UNIFIED][0]}/{pressure.CPU}") if UNIFIED in where else None,
    )


def _memory(where: Directories) -> MemoryStats | None:
    found = _each(where, "memory", memory_v1.read, memory_v2.read)
    if found is None or UNIFIED not in where:
        return found
    return replace(found, pressure=pressure.read(f"{where[UNIFIED][0]}/{pressure.MEMORY}"))


def _each[T](where: Directories, controller: str, v1: Callable[[str], T], v2: Callable[[str], T]) -> T | None:
    if controller not in where:
        return None
    directory, version = where[controller]
    return (v1 if version == 1 else v2)(directory)
