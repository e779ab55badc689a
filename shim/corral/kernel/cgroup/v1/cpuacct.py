"""The v1 cpuacct controller: processor time used. It has no limits.

Source: kernel cgroup-v1/cpuacct.rst.
"""

from corral.kernel.cgroup import files
from corral.kernel.cgroup.stats import CpuStats

USAGE = "cpuacct.usage"
USAGE_USER = "cpuacct.usage_user"
USAGE_SYS = "cpuacct.usage_sys"


def usage_ns(directory: str) -> int:
    """Processor time in nanoseconds, that of sub-cgroups included."""
    return files.read_count(f"{directory}/{USAGE}")


def read(directory: str) -> CpuStats:
    """Processor time in nanoseconds."""
    return CpuStats(
        usage_ns=files.read_count(f"{directory}/{USAGE}"),
        user_ns=files.read_count(f"{directory}/{USAGE_USER}", 0),
        system_ns=files.read_count(f"{directory}/{USAGE_SYS}", 0),
    )
