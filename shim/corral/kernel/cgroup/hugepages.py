"""Which huge page sizes this kernel has, spelt as in the names of the hugetlb controller's files.

Source: kernel admin-guide/mm/hugetlbpage.rst "/sys/kernel/mm/hugepages"; mm/hugetlb_cgroup.c mem_fmt().
"""

import functools
from pathlib import Path

DIRECTORY = Path("/sys/kernel/mm/hugepages")


@functools.cache
def sizes() -> tuple[str, ...]:
    """ "2MB", "1GB", …, smallest first; empty on a kernel without huge pages."""
    found = sorted(int(path.name.removeprefix("hugepages-").removesuffix("kB")) for path in DIRECTORY.glob("*"))
    return tuple(spell(kib) for kib in found)


def spell(kib: int) -> str:
    """A size in the kernel's spelling.

    >>> spell(64), spell(2048), spell(1048576)
    ('64KB', '2MB', '1GB')
    """
    if kib >= 1 << 20:
        return f"{kib >> 20}GB"
    return f"{kib >> 10}MB" if kib >= 1 << 10 else f"{kib}KB"
