"""cgroups of every layout: v1, v2 and hybrid hosts behind one driver. Standard library only."""

from corral.kernel.cgroup.layout import Hierarchy, Kind, Layout, detect
from corral.kernel.cgroup.membership import SELF, birthplace, join
from corral.kernel.cgroup.oom import OomWatch

__all__ = ["SELF", "Hierarchy", "Kind", "Layout", "OomWatch", "birthplace", "detect", "join"]
