"""The v1 hugetlb controller.

Source: kernel cgroup-v1/hugetlb.rst; OCI config-linux "Huge page limits".
"""

from collections.abc import Sequence
from pathlib import Path

from corral.kernel.cgroup import files, hugepages
from corral.kernel.cgroup.resources import HugetlbLimit
from corral.kernel.cgroup.stats import HugetlbStats
from corral.kernel.cgroup.steps import Step, Write, unsupported

LIMIT = "hugetlb.{}.limit_in_bytes"
RESERVED_LIMIT = "hugetlb.{}.rsvd.limit_in_bytes"
USAGE = "hugetlb.{}.usage_in_bytes"
PEAK = "hugetlb.{}.max_usage_in_bytes"
FAILCNT = "hugetlb.{}.failcnt"


def plan(directory: str, wanted: Sequence[HugetlbLimit]) -> list[Step]:
    """The writes that give a cgroup these limits; reservations too, where the kernel counts them."""
    steps: list[Step] = []
    for each in wanted:
        path = f"{directory}/{LIMIT.format(each.page_size)}"
        if not Path(path).exists():
            raise unsupported(path, f"this kernel has no huge pages of {each.page_size}")
        steps.append(Write(path, str(each.limit_bytes)))
        reserved = f"{directory}/{RESERVED_LIMIT.format(each.page_size)}"
        if Path(reserved).exists():
            steps.append(Write(reserved, str(each.limit_bytes)))
    return steps


def read(directory: str) -> tuple[HugetlbStats, ...]:
    """Usage of each page size that this kernel has."""
    return tuple(
        HugetlbStats(
            size,
            usage_bytes=files.read_number(f"{directory}/{USAGE.format(size)}"),
            max_bytes=files.read_number(f"{directory}/{PEAK.format(size)}"),
            failures=files.read_number(f"{directory}/{FAILCNT.format(size)}"),
        )
        for size in hugepages.sizes()
    )
