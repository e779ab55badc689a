"""The v2 cpuset controller. An empty list means: as the parent has.

Source: kernel cgroup-v2.rst "Cpuset"; OCI config-linux "CPU".
"""

from corral.kernel.cgroup.resources import CpuLimits
from corral.kernel.cgroup.steps import Step, Write

CPUS = "cpuset.cpus"
MEMS = "cpuset.mems"


def plan(directory: str, wanted: CpuLimits) -> list[Step]:
    """The writes that place a cgroup."""
    steps: list[Step] = []
    if wanted.mems:
        steps.append(Write(f"{directory}/{MEMS}", wanted.mems))
    if wanted.cpus:
        steps.append(Write(f"{directory}/{CPUS}", wanted.cpus))
    return steps
