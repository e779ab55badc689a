"""The v2 hugetlb controller.

Source: kernel cgroup-v2.rst "HugeTLB"; OCI config-linux "Huge page limits".
"""

from collections.abc import Sequence
from pathlib import Path

from corral.kernel.cgroup import files, hugepages
from corral.kernel.cgroup.resources import HugetlbLimit
from corral.kernel.cgroup.stats import HugetlbStats
from corral.kernel.cgroup.steps import Step, Write, unsupported

MAX = "hugetlb.{}.max"
RESERVED_MAX = "hugetlb.{}.rsvd.max"
CURRENT = "hugetlb.{}.current"
EVENTS = "hugetlb.{}.events"


def plan(directory: str, wanted: Sequence[HugetlbLimit]) -> list[Step]:
    """The writes that give a cgroup these limits; reservations too, where the kernel counts them."""
    steps: list[Step] = []
    for each in wanted:
        path = f"{directory}/{MAX.format(each.page_size)}"
        if not Path(path).exists():
            raise unsupported(path, f"this kernel has no huge pages of {each.page_size}")
        steps.append(Write(path, str(each.limit_bytes)))
        reserved = f"{directory}/{RESERVED_MAX.format(each.page_size)}"
        if Path(reserved).exists():
            steps.append(Write(reserved, str(each.limit_bytes)))
    return steps


def read(directory: str) -> tuple[HugetlbStats, ...]:
    """Usage of each page size that this kernel has; none if the controller was not turned on for the cgroup."""
    try:
        return tuple(_read(directory, size) for size in hugepages.sizes())
    except FileNotFoundError:
        return ()


def _read(directory: str, size: str) -> HugetlbStats:
    return HugetlbStats(
        size,
        usage_bytes=files.read_number(f"{directory}/{CURRENT.format(size)}"),
        failures=files.flat_keyed(files.read(f"{directory}/{EVENTS.format(size)}")).get("max", 0),
    )
