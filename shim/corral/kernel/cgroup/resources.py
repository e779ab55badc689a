"""What a cgroup may use, in the OCI runtime-spec's terms. None: leave as it is. UNLIMITED (-1): no limit.

Source: OCI runtime-spec config-linux.md "Control groups"; kernel cgroup-v2.rst.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CpuLimits:
    """Processor time and placement."""

    shares: int | None = None
    """Relative weight in v1 terms, 2 to 262144, default 1024; converted on v2."""
    quota_us: int | None = None
    """CPU time per period; UNLIMITED for no limit."""
    period_us: int | None = None
    burst_us: int | None = None
    idle: int | None = None
    """1 runs the whole group as SCHED_IDLE."""
    cpus: str | None = None
    """CPUs in list form, "0-3,5"."""
    mems: str | None = None
    realtime_runtime_us: int | None = None
    """v1 only, as is the period."""
    realtime_period_us: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """Memory, in bytes."""

    limit_bytes: int | None = None
    reservation_bytes: int | None = None
    """v1 soft limit, v2 memory.low."""
    swap_bytes: int | None = None
    """Memory plus swap, as OCI counts it."""
    swappiness: int | None = None
    """0 to 100, v1 only."""
    disable_oom_killer: bool | None = None
    """v1 only."""
    high_bytes: int | None = None
    """v2 only, as are min and oom_group."""
    min_bytes: int | None = None
    oom_group: bool | None = None
    check_before_update: bool = False
    """Refuse a limit that is below what is used and can't be taken back, as v1 does; v2 would kill for it."""


@dataclass(frozen=True, slots=True)
class PidsLimits:
    """Processes and threads together."""

    limit: int | None = None


@dataclass(frozen=True, slots=True)
class IoDeviceLimits:
    """Limits of one block device."""

    major: int
    minor: int
    weight: int | None = None
    read_bytes_per_s: int | None = None
    write_bytes_per_s: int | None = None
    read_ops_per_s: int | None = None
    write_ops_per_s: int | None = None


@dataclass(frozen=True, slots=True)
class IoLimits:
    """Block input and output."""

    weight: int | None = None
    """10 to 1000, as OCI has it; converted where the kernel's range differs."""
    devices: tuple[IoDeviceLimits, ...] = ()


@dataclass(frozen=True, slots=True)
class HugetlbLimit:
    """Huge pages of one size."""

    page_size: str
    """As the kernel's file names spell it, "2MB"."""
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class RdmaLimit:
    """One RDMA device."""

    device: str
    hca_handles: int | None = None
    hca_objects: int | None = None


@dataclass(frozen=True, slots=True)
class NetworkMarks:
    """What the packets of a cgroup carry, for the host's traffic control; v1 only."""

    class_id: int | None = None
    """A handle of tc(8): 0x10001 is 1:1."""
    priorities: tuple[tuple[str, int], ...] = ()
    """By interface of the host."""


@dataclass(frozen=True, slots=True)
class DeviceRule:
    """Allow or deny access to device nodes; of a list of rules the last that matches wins."""

    allow: bool
    type: str = "a"
    """ "a" all, "c" character, "b" block."""
    major: int | None = None
    """None matches any number."""
    minor: int | None = None
    access: str = "rwm"
    """Any of r(ead), w(rite), m(knod)."""


@dataclass(frozen=True, slots=True)
class Resources:
    """All limits of one cgroup, or the ones to change."""

    cpu: CpuLimits = field(default_factory=CpuLimits)
    memory: MemoryLimits = field(default_factory=MemoryLimits)
    pids: PidsLimits = field(default_factory=PidsLimits)
    io: IoLimits = field(default_factory=IoLimits)
    hugetlb: tuple[HugetlbLimit, ...] = ()
    rdma: tuple[RdmaLimit, ...] = ()
    network: NetworkMarks = field(default_factory=NetworkMarks)
    devices: tuple[DeviceRule, ...] | None = None
    """The complete rule list: what none of them matches is allowed. None leaves the rules alone."""
    unified: Mapping[str, str] = field(default_factory=dict)
    """Raw cgroup v2 files and values, applied last."""
