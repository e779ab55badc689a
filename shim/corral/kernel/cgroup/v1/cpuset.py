"""The v1 cpuset controller. A new cpuset has neither CPUs nor memory nodes and takes no process until it has.

Source: kernel cgroup-v1/cpusets.rst; OCI config-linux "CPU".
"""

from corral.kernel.cgroup import files
from corral.kernel.cgroup.resources import CpuLimits
from corral.kernel.cgroup.steps import Step, Write

CPUS = "cpuset.cpus"
MEMS = "cpuset.mems"
CLONE_CHILDREN = "cgroup.clone_children"


def inherit(directory: str, parent: str) -> None:
    """Give a new cpuset its parent's memory nodes and CPUs, where cgroup.clone_children has not done so.

    A parent that somebody has made and left empty is given its own first, as with runc.
    """
    if files.read(f"{directory}/{MEMS}"):  # the kernel fills both, or neither
        return
    if not files.read(f"{parent}/{MEMS}"):  # not the root, which has all there are
        inherit(parent, parent.rpartition("/")[0])
    for name in (MEMS, CPUS):
        files.write(f"{directory}/{name}", files.read(f"{parent}/{name}"))


def bequeath(directory: str) -> None:
    """Let cpusets made below this one start with its CPUs and nodes; the kernel then does inherit()'s work."""
    files.write(f"{directory}/{CLONE_CHILDREN}", "1")


def plan(directory: str, wanted: CpuLimits) -> list[Step]:
    """The writes that place a cgroup; memory nodes first, a cpuset without any takes no process."""
    steps: list[Step] = []
    if wanted.mems:
        steps.append(Write(f"{directory}/{MEMS}", wanted.mems))
    if wanted.cpus:
        steps.append(Write(f"{directory}/{CPUS}", wanted.cpus))
    return steps
