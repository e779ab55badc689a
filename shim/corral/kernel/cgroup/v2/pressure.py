"""Pressure stall information of a v2 cgroup; on hybrid hosts too, for who was moved into the v2 hierarchy.

Source: kernel accounting/psi.rst, cgroup-v2.rst "cpu.pressure".
"""

from functools import lru_cache

from corral.kernel.cgroup import files
from corral.kernel.cgroup.stats import Pressure

CPU = "cpu.pressure"
MEMORY = "memory.pressure"
IO = "io.pressure"

_WORDS = 9
"""Of a line: its name, and four names with their values."""
_NONE = [b"0"] * 4


def read(path: str) -> Pressure | None:
    """One pressure file; None if the kernel has no PSI, or has it turned off."""
    try:
        text = files.read_bytes(path)
    except OSError:  # ENOENT without PSI, EOPNOTSUPP with psi=0
        return None
    return parse(text)


@lru_cache(maxsize=2048)  # most cgroups say the same as a second ago, and many the same as another
def parse(text: bytes) -> Pressure:
    """The "some" and "full" lines of a pressure file; kernels before 5.13 have none of "full" for CPUs.

    The same text gives the same object.

    >>> parse(b"some avg10=1.50 avg60=0.00 avg300=0.00 total=42").some_avg10
    1.5
    """
    words = text.replace(b"=", b" ").split()
    lines = {words[at]: words[at + 2 : at + 9 : 2] for at in range(0, len(words), _WORDS)}
    (s10, s60, s300, some), (f10, f60, f300, full) = lines.get(b"some", _NONE), lines.get(b"full", _NONE)
    return Pressure(float(s10), float(s60), float(s300), int(some), float(f10), float(f60), float(f300), int(full))
