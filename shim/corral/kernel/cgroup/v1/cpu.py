"""The v1 cpu controller: CFS bandwidth, shares, real-time budget.

Source: kernel scheduler/sched-bwc.rst, sched-design-CFS.rst, sched-rt-group.rst; OCI config-linux "CPU".
"""

from corral.kernel.cgroup import convert, files, idle
from corral.kernel.cgroup.resources import CpuLimits
from corral.kernel.cgroup.stats import CpuStats
from corral.kernel.cgroup.steps import Step, Write, check_range
from corral.kernel.cgroup.v1 import realtime

SHARES = "cpu.shares"
QUOTA = "cpu.cfs_quota_us"
PERIOD = "cpu.cfs_period_us"
BURST = "cpu.cfs_burst_us"
STAT = "cpu.stat"

DEFAULT_PERIOD_US = 100_000
"""What a new cgroup has, whatever its parent's is."""


def plan(directory: str, wanted: CpuLimits, *, fresh: bool = False) -> list[Step]:
    """The writes that give a cgroup these limits, in an order the kernel accepts. fresh: it was just made."""
    if wanted.shares is not None:
        # The kernel would clamp in silence.
        path = f"{directory}/{SHARES}"
        check_range(path, wanted.shares, convert.SHARES_MIN, convert.SHARES_MAX, what="CPU shares")
    steps = idle.plan(directory, SHARES, idle=wanted.idle, weight=wanted.shares, fresh=fresh)
    steps += _bandwidth(directory, wanted, fresh=fresh)
    return steps + _realtime(directory, wanted)


def _realtime(directory: str, wanted: CpuLimits) -> list[Step]:
    """The runtime has to lie within the period all the time: a period that the present one exceeds comes second."""
    path = f"{directory}/{realtime.RUNTIME}"
    runtime: list[Step] = []
    if wanted.realtime_runtime_us is not None:
        runtime = [Write(path, str(wanted.realtime_runtime_us))]
    if wanted.realtime_period_us is None:
        return runtime
    period: list[Step] = [Write(f"{directory}/{realtime.PERIOD}", str(wanted.realtime_period_us))]
    shrinks = bool(runtime) and files.read_number(path, 0) > wanted.realtime_period_us
    return runtime + period if shrinks else period + runtime


def _bandwidth(directory: str, wanted: CpuLimits, *, fresh: bool) -> list[Step]:
    """Every single write is checked: quota over period against the parent's and children's, burst against quota.

    So the burst is taken away while the quota changes, and a new period goes over "no quota", which always fits.
    """
    quota, period, burst = (f"{directory}/{name}" for name in (QUOTA, PERIOD, BURST))
    steps: list[Step] = []
    after_burst = wanted.burst_us
    if wanted.quota_us is not None or wanted.period_us is not None:
        now_burst = 0 if fresh else files.read_number(burst, 0)
        if now_burst:
            steps.append(Write(burst, "0"))
            after_burst = now_burst if after_burst is None else after_burst
    if wanted.period_us is not None:
        now_quota = files.UNLIMITED if fresh else files.read_number(quota)
        after_quota = now_quota if wanted.quota_us is None else wanted.quota_us
        if now_quota != files.UNLIMITED:
            steps.append(Write(quota, "-1"))
        if not (fresh and wanted.period_us == DEFAULT_PERIOD_US):
            steps.append(Write(period, str(wanted.period_us)))
        if after_quota != files.UNLIMITED:
            steps.append(Write(quota, str(after_quota)))
    elif wanted.quota_us is not None:
        steps.append(Write(quota, str(wanted.quota_us)))
    if after_burst is not None:
        steps.append(Write(burst, str(after_burst)))
    return steps


def bandwidth(directory: str) -> tuple[int, int]:
    """Microseconds of CPU time, UNLIMITED for no limit, in each period of so many."""
    return files.read_number(f"{directory}/{QUOTA}"), files.read_number(f"{directory}/{PERIOD}")


def read(directory: str) -> CpuStats:
    """How often the quota stopped the group; the time used is counted by cpuacct."""
    stat = files.read_counts(f"{directory}/{STAT}")
    return CpuStats(
        periods=int(stat.get(b"nr_periods", 0)),
        throttled_periods=int(stat.get(b"nr_throttled", 0)),
        throttled_ns=int(stat.get(b"throttled_time", 0)),
    )
