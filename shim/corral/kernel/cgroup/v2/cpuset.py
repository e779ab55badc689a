"""The v2 cpuset controller. An empty list means: as the parent has.

Source: kernel cgroup-v2.rst "Cpuset"; OCI config-linux "CPU".
"""

from dataclasses import dataclass

from corral.kernel.cgroup import files
from corral.kernel.cgroup.resources import CpuLimits
from corral.kernel.cgroup.steps import Step, Write, invalid

CPUS = "cpuset.cpus"
MEMS = "cpuset.mems"


@dataclass(frozen=True, slots=True)
class Partition:
    """Make a cgroup a partition of CPUs. The kernel takes the write in any case: reading tells whether it is one."""

    path: str
    value: str

    def describe(self) -> str:
        """As a shell would do it."""
        return f"echo {self.value!r} > {self.path}"

    def inverse(self) -> Write:
        """The write of the kind that it is now, valid or not."""
        return Write(self.path, files.read(self.path).split()[0])

    def apply(self) -> None:
        """Write. Raises OSError(EINVAL) with the kernel's reason if it comes to nothing."""
        back = self.inverse()
        Write(self.path, self.value).apply()
        _, is_invalid, reason = files.read(self.path).partition(" invalid")
        if is_invalid:
            back.apply()
            why = reason or " the kernel gives no reason"
            raise invalid(self.path, f"it cannot be the partition {self.value!r}:{why}")


def plan(directory: str, wanted: CpuLimits) -> list[Step]:
    """The writes that place a cgroup."""
    steps: list[Step] = []
    if wanted.mems:
        steps.append(Write(f"{directory}/{MEMS}", wanted.mems))
    if wanted.cpus:
        steps.append(Write(f"{directory}/{CPUS}", wanted.cpus))
    return steps
