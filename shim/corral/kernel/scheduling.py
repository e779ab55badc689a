"""What the kernel gives a process of the machine: time of its CPUs, of its disks, and memory of which node.

All of it is inherited over fork and exec. Sources: sched_setattr(2), ioprio_set(2),
set_mempolicy(2), personality(2).
"""

import ctypes
import os
import struct
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from enum import Enum, IntEnum, IntFlag

from corral.kernel.syscalls import check, syscall


class Policy(IntEnum):
    """SCHED_*. Source: include/uapi/linux/sched.h."""

    OTHER = 0
    FIFO = 1
    RR = 2
    BATCH = 3
    ISO = 4
    IDLE = 5
    DEADLINE = 6


class SchedulerFlags(IntFlag):
    """SCHED_FLAG_*."""

    RESET_ON_FORK = 0x01
    RECLAIM = 0x02
    DL_OVERRUN = 0x04
    KEEP_POLICY = 0x08
    KEEP_PARAMS = 0x10
    UTIL_CLAMP_MIN = 0x20
    UTIL_CLAMP_MAX = 0x40


class IOClass(IntEnum):
    """IOPRIO_CLASS_*. Source: include/uapi/linux/ioprio.h."""

    RT = 1
    BE = 2
    IDLE = 3


class MemoryMode(IntEnum):
    """MPOL_*. Source: include/uapi/linux/mempolicy.h."""

    DEFAULT = 0
    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3
    LOCAL = 4
    PREFERRED_MANY = 5
    WEIGHTED_INTERLEAVE = 6


class MemoryFlags(IntFlag):
    """MPOL_F_*."""

    NUMA_BALANCING = 1 << 13
    RELATIVE_NODES = 1 << 14
    STATIC_NODES = 1 << 15


class Domain(Enum):
    """PER_*. Source: include/uapi/linux/personality.h."""

    LINUX = 0x0000
    LINUX32 = 0x0008


# struct sched_attr, version 1: size, policy, flags, nice, priority, runtime, deadline, period, least and most
# utilisation.
_ATTRIBUTES = struct.Struct("=IIQiIQQQII")
_PROCESS_GROUP = 1
_CLASS_SHIFT = 13
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)

_sched_setattr = syscall("sched_setattr", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_ioprio_set = syscall("ioprio_set", ctypes.c_int, ctypes.c_int, ctypes.c_int)
_set_mempolicy = syscall("set_mempolicy", ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong)
_personality = syscall("personality", ctypes.c_ulong)


def set_scheduler(
    policy: Policy,
    flags: SchedulerFlags,
    *,
    pid: int = 0,
    nice: int = 0,
    priority: int = 0,
    runtime_ns: int = 0,
    deadline_ns: int = 0,
    period_ns: int = 0,
) -> None:
    """Have a process, 0 for the caller, scheduled so.

    One with DEADLINE can't fork, unless with RESET_ON_FORK, which makes its children ordinary. Raises OSError(EINVAL)
    for values the policy does not have, EPERM without CAP_SYS_NICE.
    """
    attributes = _ATTRIBUTES.pack(
        _ATTRIBUTES.size, policy, flags, nice, priority, runtime_ns, deadline_ns, period_ns, 0, 0
    )
    check(_sched_setattr(pid, attributes, 0), f"sched_setattr SCHED_{policy.name}")


def set_io_priority(io_class: IOClass, priority: int) -> None:
    """Give the caller's whole process group a priority, of 0 (highest) to 7, in a class.

    Raises OSError(EPERM) for RT without CAP_SYS_NICE or CAP_SYS_ADMIN.
    """
    check(
        _ioprio_set(_PROCESS_GROUP, 0, io_class << _CLASS_SHIFT | priority), f"ioprio_set IOPRIO_CLASS_{io_class.name}"
    )


def set_memory_policy(mode: MemoryMode, flags: MemoryFlags, nodes: AbstractSet[int]) -> None:
    """Take memory from these nodes. Raises OSError(EINVAL) for a node or a mode this machine lacks."""
    words = _words(nodes)
    mask = (ctypes.c_ulong * len(words))(*words) if words else None
    # The kernel takes the number of bits to be one less than it is told.
    bits = len(words) * _WORD_BITS + 1 if words else 0
    check(_set_mempolicy(mode | flags, mask, bits), f"set_mempolicy MPOL_{mode.name}")


def _words(numbers: Iterable[int]) -> list[int]:
    """A bit mask, least significant word first."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    words = []
    while mask:
        words.append(mask & (1 << _WORD_BITS) - 1)
        mask >>= _WORD_BITS
    return words


def set_personality(domain: Domain) -> None:
    """Be of this execution domain."""
    check(_personality(domain.value), f"personality PER_{domain.name}")


def cpus() -> AbstractSet[int]:
    """The CPUs the caller may run on."""
    return os.sched_getaffinity(0)


def set_cpus(wanted: AbstractSet[int]) -> None:
    """Run on these CPUs only; raises OSError(EINVAL) if the caller may use none of them."""
    os.sched_setaffinity(0, wanted)
