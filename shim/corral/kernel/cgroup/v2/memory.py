"""The v2 memory controller.

Source: kernel cgroup-v2.rst "Memory"; OCI config-linux "Memory".
"""

import errno

from corral.kernel.cgroup import convert, files
from corral.kernel.cgroup.resources import MemoryLimits
from corral.kernel.cgroup.stats import MemoryStats
from corral.kernel.cgroup.steps import Step, Write, check_limit, invalid, unsupported

MAX = "memory.max"
HIGH = "memory.high"
LOW = "memory.low"
MIN = "memory.min"
SWAP_MAX = "memory.swap.max"
OOM_GROUP = "memory.oom.group"
CURRENT = "memory.current"
RECLAIM = "memory.reclaim"
PEAK = "memory.peak"
SWAP_CURRENT = "memory.swap.current"
EVENTS = "memory.events"
STAT = "memory.stat"


def plan(directory: str, wanted: MemoryLimits) -> list[Step]:
    """The writes that give a cgroup these limits."""
    if wanted.swappiness is not None:
        raise unsupported(directory, "swappiness per cgroup exists on cgroup v1 only")
    if wanted.disable_oom_killer:
        raise unsupported(directory, "the OOM killer can be turned off on cgroup v1 only")
    if wanted.check_before_update and wanted.limit_bytes not in (None, files.UNLIMITED):
        _check_room(directory, wanted.limit_bytes)
    steps: list[Step] = []
    for name, value in (
        (MAX, wanted.limit_bytes),
        (HIGH, wanted.high_bytes),
        (LOW, _protection(wanted.reservation_bytes)),
        (MIN, _protection(wanted.min_bytes)),
    ):
        if value is not None:
            path = f"{directory}/{name}"
            check_limit(path, value, what=name)
            steps.append(Write(path, files.limit(value)))
    steps += _swap(directory, wanted)
    if wanted.oom_group is not None:
        steps.append(Write(f"{directory}/{OOM_GROUP}", str(int(wanted.oom_group))))
    return steps


def _check_room(directory: str, limit_bytes: int) -> None:
    if (usage := shrink(directory, limit_bytes)) > limit_bytes:
        why = f"{usage} bytes are in use, and processes would be killed for a limit of {limit_bytes}"
        raise OSError(errno.EBUSY, why, f"{directory}/{MAX}")


def _protection(value: int | None) -> int | None:
    """No reservation protects nothing, where no limit (-1) of the other kind allows everything."""
    return 0 if value == files.UNLIMITED else value


def _swap(directory: str, wanted: MemoryLimits) -> list[Step]:
    swap = wanted.swap_bytes
    if swap is None:
        if wanted.limit_bytes != files.UNLIMITED:
            return []
        swap = files.UNLIMITED  # OCI: no memory limit and nothing said of swap means none there either
    path = f"{directory}/{SWAP_MAX}"
    check_limit(path, swap, what="the memory+swap limit")
    memory = wanted.limit_bytes
    if memory is None:
        memory = files.read_number(f"{directory}/{MAX}")
    try:
        value = convert.swap_max(swap, memory)
    except ValueError as e:
        raise invalid(path, str(e)) from e
    if files.read_number(path, -2) == -2:  # a kernel without swap accounting
        if value in (files.UNLIMITED, 0):
            return []
        raise unsupported(path, "this kernel does not count swap per cgroup")
    return [Write(path, files.limit(value))]


def limit(directory: str) -> int:
    """Its own limit in bytes, whatever holds above it."""
    return files.read_number(f"{directory}/{MAX}")


def lift(directory: str) -> list[Step]:
    """Let memory have no limit; that of swap stays."""
    return [Write(f"{directory}/{MAX}", files.limit(files.UNLIMITED))]


def shrink(directory: str, size_bytes: int) -> int:
    """Take memory back until no more than this is used, as far as it can be; returns what is used then.

    Linux before 5.19 takes it back only for a limit. There the page cache, which that would take, is not counted.
    """
    usage = files.read_count(f"{directory}/{CURRENT}")
    if usage <= size_bytes:
        return usage
    try:
        files.write(f"{directory}/{RECLAIM}", str(usage - size_bytes))
    except FileNotFoundError:
        stat = files.read_counts(f"{directory}/{STAT}")
        return usage - int(stat[b"active_file"]) - int(stat[b"inactive_file"])
    except OSError:
        pass  # EAGAIN: not all of it
    return files.read_count(f"{directory}/{CURRENT}")


def read(directory: str) -> MemoryStats:
    """Usage and its parts, hierarchical: sub-cgroups count."""
    stat = files.read_counts(f"{directory}/{STAT}")
    events = files.read_counts(f"{directory}/{EVENTS}")
    usage = files.read_count(f"{directory}/{CURRENT}")
    return MemoryStats(
        usage_bytes=usage,
        working_set_bytes=max(0, usage - int(stat.get(b"inactive_file", 0))),
        limit_bytes=files.read_number(f"{directory}/{MAX}"),
        peak_bytes=files.read_count(f"{directory}/{PEAK}", 0),
        swap_bytes=files.read_count(f"{directory}/{SWAP_CURRENT}", 0),
        anon_bytes=int(stat.get(b"anon", 0)),
        file_bytes=int(stat.get(b"file", 0)),
        kernel_bytes=int(stat.get(b"kernel", 0)),
        shmem_bytes=int(stat.get(b"shmem", 0)),
        page_faults=int(stat.get(b"pgfault", 0)),
        major_page_faults=int(stat.get(b"pgmajfault", 0)),
        oom_kills=int(events.get(b"oom_kill", 0)),
        limit_hits=int(events.get(b"max", 0)),
    )
