"""cgroups of every layout: v1, v2 and hybrid hosts behind one driver. Standard library only.

driver = open_driver(detect())
web = driver.create("/corral/default/web", Resources(memory=MemoryLimits(limit_bytes=64 << 20)))
clone_into, rest = birthplace(web.paths())   # then, in the child: join(rest)
web.read().memory, web.freeze(), web.thaw(), web.kill(), web.remove()
"""

from corral.kernel.cgroup.device_rules import DEFAULT_RULES
from corral.kernel.cgroup.driver import OWNER, Driver, check_path, open_driver
from corral.kernel.cgroup.files import UNLIMITED
from corral.kernel.cgroup.group import Cgroup
from corral.kernel.cgroup.layout import Hierarchy, Kind, Layout, detect
from corral.kernel.cgroup.membership import SELF, birthplace, join, path_in_v2
from corral.kernel.cgroup.oom import OomWatch
from corral.kernel.cgroup.pressure import PressureTrigger, PressureWatch
from corral.kernel.cgroup.resources import (
    CpuLimits,
    DeviceRule,
    HugetlbLimit,
    IoDeviceLimits,
    IoLimits,
    MemoryLimits,
    NetworkMarks,
    PidsLimits,
    RdmaLimit,
    Resources,
)
from corral.kernel.cgroup.stats import (
    CpuStats,
    HugetlbStats,
    IoStats,
    MemoryStats,
    PidsStats,
    Pressure,
    Stats,
)

__all__ = [
    "DEFAULT_RULES",
    "OWNER",
    "SELF",
    "UNLIMITED",
    "Cgroup",
    "CpuLimits",
    "CpuStats",
    "DeviceRule",
    "Driver",
    "Hierarchy",
    "HugetlbLimit",
    "HugetlbStats",
    "IoDeviceLimits",
    "IoLimits",
    "IoStats",
    "Kind",
    "Layout",
    "MemoryLimits",
    "MemoryStats",
    "NetworkMarks",
    "OomWatch",
    "PidsLimits",
    "PidsStats",
    "Pressure",
    "PressureTrigger",
    "PressureWatch",
    "RdmaLimit",
    "Resources",
    "Stats",
    "birthplace",
    "check_path",
    "detect",
    "join",
    "open_driver",
    "path_in_v2",
]
