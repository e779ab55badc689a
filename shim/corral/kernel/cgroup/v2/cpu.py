"""The v2 cpu controller.

Source: kernel cgroup-v2.rst "CPU"; OCI config-linux "CPU".
"""

from corral.kernel.cgroup import convert, files, idle
from corral.kernel.cgroup.resources import CpuLimits
from corral.kernel.cgroup.stats import CpuStats
from corral.kernel.cgroup.steps import Step, Write, check_range, unsupported

WEIGHT = "cpu.weight"
MAX = "cpu.max"
BURST = "cpu.max.burst"
STAT = "cpu.stat"


def plan(directory: str, wanted: CpuLimits) -> list[Step]:
    """The writes that give a cgroup these limits, in an order the kernel accepts."""
    if wanted.realtime_runtime_us or wanted.realtime_period_us:
        raise unsupported(directory, "real-time CPU budgets exist on cgroup v1 only")
    weight: int | None = None
    if wanted.shares is not None:
        path = f"{directory}/{WEIGHT}"
        check_range(path, wanted.shares, convert.SHARES_MIN, convert.SHARES_MAX, what="CPU shares")
        weight = convert.cpu_weight(wanted.shares)
    steps = idle.plan(directory, WEIGHT, idle=wanted.idle, weight=weight)
    return steps + _bandwidth(directory, wanted)


def _bandwidth(directory: str, wanted: CpuLimits) -> list[Step]:
    """A burst may at no moment exceed the quota, so it is taken away while the quota changes."""
    burst = f"{directory}/{BURST}"
    steps: list[Step] = []
    after_burst = wanted.burst_us
    if wanted.quota_us is not None or wanted.period_us is not None:
        now_burst = files.read_number(burst, 0)
        if now_burst:
            steps.append(Write(burst, "0"))
            after_burst = now_burst if after_burst is None else after_burst
        quota, period = files.read(f"{directory}/{MAX}").split()
        if wanted.quota_us is not None:
            quota = "max" if wanted.quota_us < 0 else str(wanted.quota_us)
        steps.append(Write(f"{directory}/{MAX}", f"{quota} {wanted.period_us or period}"))
    if after_burst is not None:
        steps.append(Write(burst, str(after_burst)))
    return steps


def bandwidth(directory: str) -> tuple[int, int]:
    """Microseconds of CPU time, UNLIMITED for no limit, in each period of so many."""
    quota, period = files.read(f"{directory}/{MAX}").split()
    return files.number(quota), int(period)


def read(directory: str) -> CpuStats:
    """Time used and throttled. A cgroup without the cpu controller still counts the time used."""
    stat = files.read_counts(f"{directory}/{STAT}")
    return CpuStats(
        usage_ns=int(stat.get(b"usage_usec", 0)) * 1000,
        user_ns=int(stat.get(b"user_usec", 0)) * 1000,
        system_ns=int(stat.get(b"system_usec", 0)) * 1000,
        periods=int(stat.get(b"nr_periods", 0)),
        throttled_periods=int(stat.get(b"nr_throttled", 0)),
        throttled_ns=int(stat.get(b"throttled_usec", 0)) * 1000,
    )
