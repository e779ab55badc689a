"""How the kernel is to treat a process: members of config.json. corral.oci.spec has the whole.

What becomes of them is in corral.oci.allotment.
"""

from dataclasses import dataclass
from typing import Annotated

from corral.oci.decode import I32, U64, Choice, Range

SchedulerPolicy = Annotated[
    str, Choice("SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE")
]
"""How the kernel picks the process among others. Source: sched(7)."""


SchedulerFlag = Annotated[
    str,
    Choice(
        "SCHED_FLAG_RESET_ON_FORK",
        "SCHED_FLAG_RECLAIM",
        "SCHED_FLAG_DL_OVERRUN",
        "SCHED_FLAG_KEEP_POLICY",
        "SCHED_FLAG_KEEP_PARAMS",
        "SCHED_FLAG_UTIL_CLAMP_MIN",
        "SCHED_FLAG_UTIL_CLAMP_MAX",
    ),
]
"""Source: sched_setattr(2)."""


@dataclass(frozen=True, slots=True)
class Scheduler:
    """nice counts for OTHER and BATCH, priority for FIFO and RR; the times, in nanoseconds, for DEADLINE."""

    policy: SchedulerPolicy
    nice: I32 = 0
    priority: I32 = 0
    flags: tuple[SchedulerFlag, ...] = ()
    runtime: U64 = 0
    deadline: U64 = 0
    period: U64 = 0


IOPriorityClass = Annotated[str, Choice("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE")]
"""Source: ioprio_set(2)."""


@dataclass(frozen=True, slots=True)
class IOPriority:
    """0 is the highest priority of a class."""

    class_: IOPriorityClass
    priority: Annotated[int, Range(0, 7)] = 0


@dataclass(frozen=True, slots=True)
class CPUAffinity:
    """Lists of CPUs (0-3,7) for a process that joins: before it is in the container's cgroup, and once it is."""

    initial: str = ""
    final: str = ""


MemoryPolicyMode = Annotated[
    str,
    Choice(
        "MPOL_DEFAULT",
        "MPOL_BIND",
        "MPOL_INTERLEAVE",
        "MPOL_WEIGHTED_INTERLEAVE",
        "MPOL_PREFERRED",
        "MPOL_PREFERRED_MANY",
        "MPOL_LOCAL",
    ),
]
"""Where memory comes from. Source: set_mempolicy(2)."""


MemoryPolicyFlag = Annotated[str, Choice("MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES")]
"""Source: set_mempolicy(2)."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """The NUMA policy of the container's processes; nodes is a list (0-3,7)."""

    mode: MemoryPolicyMode
    nodes: str = ""
    flags: tuple[MemoryPolicyFlag, ...] = ()


PersonalityDomain = Annotated[str, Choice("LINUX", "LINUX32")]
"""Source: personality(2)."""


@dataclass(frozen=True, slots=True)
class Personality:
    """The execution domain: with LINUX32 uname shows a 32-bit machine. There are no flags."""

    domain: PersonalityDomain
    flags: tuple[str, ...] = ()
