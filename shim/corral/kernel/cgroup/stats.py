"""One reading of a cgroup's counters. What a kernel does not count is 0; a whole part it lacks is None.

Source: kernel cgroup-v2.rst "Controllers"; cgroup-v1 cpuacct.rst, memory.rst, blkio-controller.rst; psi.rst.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pressure:
    """Stall time: shares of the last 10, 60 and 300 s in percent, and the total."""

    some_avg10: float = 0.0
    some_avg60: float = 0.0
    some_avg300: float = 0.0
    some_total_us: int = 0
    full_avg10: float = 0.0
    full_avg60: float = 0.0
    full_avg300: float = 0.0
    full_total_us: int = 0


@dataclass(frozen=True, slots=True)
class CpuStats:
    """Processor time used, and how often the quota stopped the group."""

    usage_ns: int = 0
    user_ns: int = 0
    system_ns: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled_ns: int = 0
    pressure: Pressure | None = None


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Memory in bytes. limit_bytes is UNLIMITED (-1) without a limit."""

    usage_bytes: int = 0
    working_set_bytes: int = 0
    """Usage less what the kernel can drop at once (inactive file cache)."""
    limit_bytes: int = -1
    peak_bytes: int = 0
    swap_bytes: int = 0
    anon_bytes: int = 0
    file_bytes: int = 0
    kernel_bytes: int = 0
    shmem_bytes: int = 0
    page_faults: int = 0
    major_page_faults: int = 0
    oom_kills: int = 0
    limit_hits: int = 0
    """How often the limit stopped an allocation."""
    pressure: Pressure | None = None


@dataclass(frozen=True, slots=True)
class PidsStats:
    """Processes and threads; limit is UNLIMITED (-1) without one."""

    current: int = 0
    limit: int = -1


@dataclass(frozen=True, slots=True)
class IoStats:
    """What went through one block device."""

    major: int
    minor: int
    read_bytes: int = 0
    write_bytes: int = 0
    read_ops: int = 0
    write_ops: int = 0


@dataclass(frozen=True, slots=True)
class HugetlbStats:
    """Huge pages of one size."""

    page_size: str
    usage_bytes: int = 0
    max_bytes: int = 0
    """The highest usage seen; 0 on v2, which does not keep it."""
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Everything that one reading of a cgroup gives; a part is None where no controller counts it."""

    cpu: CpuStats | None = None
    memory: MemoryStats | None = None
    pids: PidsStats | None = None
    io: tuple[IoStats, ...] = ()
    hugetlb: tuple[HugetlbStats, ...] = ()
    io_pressure: Pressure | None = None
