"""The v1 memory controller.

Source: kernel cgroup-v1/memory.rst; OCI config-linux "Memory".
"""

from corral.kernel.cgroup import files
from corral.kernel.cgroup.resources import MemoryLimits
from corral.kernel.cgroup.stats import MemoryStats
from corral.kernel.cgroup.steps import Step, Write, check_limit, check_range, invalid, unsupported
from corral.kernel.cgroup.v1.oom_kills import OOM_CONTROL
from corral.kernel.cgroup.v1.oom_kills import below as _kills_below

LIMIT = "memory.limit_in_bytes"
SOFT_LIMIT = "memory.soft_limit_in_bytes"
SWAP_LIMIT = "memory.memsw.limit_in_bytes"
SWAPPINESS = "memory.swappiness"
USAGE = "memory.usage_in_bytes"
PEAK = "memory.max_usage_in_bytes"
KERNEL_USAGE = "memory.kmem.usage_in_bytes"
FAILCNT = "memory.failcnt"
SWAP_FAILCNT = "memory.memsw.failcnt"
STAT = "memory.stat"


def plan(directory: str, wanted: MemoryLimits, *, fresh: bool = False) -> list[Step]:
    """The writes that give a cgroup these limits, in an order the kernel accepts. fresh: it was just made."""
    _refuse_v2_only(directory, wanted)
    steps = _limits(directory, wanted.limit_bytes, wanted.swap_bytes, fresh=fresh)
    if wanted.reservation_bytes is not None:
        path = f"{directory}/{SOFT_LIMIT}"
        check_limit(path, wanted.reservation_bytes, what="the memory reservation")
        steps.append(Write(path, str(wanted.reservation_bytes)))
    if wanted.swappiness is not None:
        path = f"{directory}/{SWAPPINESS}"
        check_range(path, wanted.swappiness, 0, 100, what="swappiness")
        steps.append(Write(path, str(wanted.swappiness)))
    if wanted.disable_oom_killer is not None:
        disabled = files.flat_keyed(files.read(f"{directory}/{OOM_CONTROL}"))["oom_kill_disable"]
        value = str(int(wanted.disable_oom_killer))
        steps.append(Write(f"{directory}/{OOM_CONTROL}", value, undo=str(disabled)))
    return steps


def _refuse_v2_only(directory: str, wanted: MemoryLimits) -> None:
    v2_only = {"high": wanted.high_bytes, "min": wanted.min_bytes, "oom.group": wanted.oom_group}
    for name, value in v2_only.items():
        if value is not None and value is not False:
            raise unsupported(directory, f"memory.{name} exists on cgroup v2 only")


def _limits(directory: str, limit: int | None, swap: int | None, *, fresh: bool) -> list[Step]:
    """Memory and memory+swap. The first may at no moment exceed the second, so the order depends on both."""
    limit_path, swap_path = f"{directory}/{LIMIT}", f"{directory}/{SWAP_LIMIT}"
    for path, value in ((limit_path, limit), (swap_path, swap)):
        if value is not None:
            check_limit(path, value, what="a memory limit")
    steps: list[Step] = []
    if limit is not None:
        steps.append(Write(limit_path, str(limit)))
    current_swap = files.read_number(swap_path, -2)
    if current_swap == -2:  # a kernel without swap accounting
        if swap not in (None, files.UNLIMITED, limit):
            raise unsupported(swap_path, "this kernel does not count swap per cgroup")
        return steps
    if limit == files.UNLIMITED and swap is None:
        swap = files.UNLIMITED  # OCI: no memory limit and nothing said of swap means none there either
    current = files.UNLIMITED if fresh else files.read_number(limit_path)
    after, after_swap = current if limit is None else limit, current_swap if swap is None else swap
    if after_swap != files.UNLIMITED and (after == files.UNLIMITED or after > after_swap):
        raise invalid(
            limit_path,
            f"the memory limit {after} would exceed the memory+swap limit {after_swap}; change both",
        )
    if swap is None or swap == current_swap:
        return steps
    raises_swap = swap == files.UNLIMITED or (current != files.UNLIMITED and swap >= current)
    return [Write(swap_path, str(swap)), *steps] if raises_swap else [*steps, Write(swap_path, str(swap))]


def limit(directory: str) -> int:
    """Its own limit in bytes, whatever holds above it."""
    return files.read_number(f"{directory}/{LIMIT}")


def lift(directory: str) -> list[Step]:
    """Let memory have no limit of its own; the one of memory and swap together stays, and is the highest it may be."""
    return [Write(f"{directory}/{LIMIT}", str(files.read_number(f"{directory}/{SWAP_LIMIT}", files.UNLIMITED)))]


def read(directory: str) -> MemoryStats:
    """Usage and its parts, hierarchical: sub-cgroups count."""
    stat = files.read_counts(f"{directory}/{STAT}")
    usage = files.read_count(f"{directory}/{USAGE}")
    oom = files.read_counts(f"{directory}/{OOM_CONTROL}")
    oom_kills = int(oom.get(b"oom_kill", 0)) + sum(_kills_below(directory).values())
    limit = stat.get(b"hierarchical_memory_limit")
    return MemoryStats(
        usage_bytes=usage,
        working_set_bytes=max(0, usage - int(stat.get(b"total_inactive_file", 0))),
        limit_bytes=files.UNLIMITED if limit is None else files.number(limit.decode()),
        peak_bytes=files.read_count(f"{directory}/{PEAK}"),
        swap_bytes=int(stat.get(b"total_swap", 0)),
        anon_bytes=int(stat.get(b"total_rss", 0)),
        file_bytes=int(stat.get(b"total_cache", 0)),
        kernel_bytes=files.read_count(f"{directory}/{KERNEL_USAGE}", 0),
        shmem_bytes=int(stat.get(b"total_shmem", 0)),
        page_faults=int(stat.get(b"total_pgfault", 0)),
        major_page_faults=int(stat.get(b"total_pgmajfault", 0)),
        oom_kills=oom_kills,
        # With as much memory as memory and swap together, the second limit is the one that is hit.
        limit_hits=files.read_count(f"{directory}/{FAILCNT}") + files.read_count(f"{directory}/{SWAP_FAILCNT}", 0),
    )
