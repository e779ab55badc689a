"""Pressure stall information of a v2 cgroup; on hybrid hosts too, for who was moved into the v2 hierarchy.

Source: kernel accounting/psi.rst, cgroup-v2.rst "cpu.pressure".
"""

from corral.kernel.cgroup import files
from corral.kernel.cgroup.stats import Pressure

CPU = "cpu.pressure"
MEMORY = "memory.pressure"
IO = "io.pressure"


def read(path: str) -> Pressure | None:
    """One pressure file; None if the kernel has no PSI, or has it turned off."""
    try:
        text = files.read(path)
    except OSError:  # ENOENT without PSI, EOPNOTSUPP with psi=0
        return None
    return parse(text)


def parse(text: str) -> Pressure:
    """The "some" and "full" lines of a pressure file.

    >>> parse("some avg10=1.50 avg60=0.00 avg300=0.00 total=42").some_avg10
    1.5
    """
    lines = dict(files.nested_keyed(text))
    some, full = lines.get("some", {}), lines.get("full", {})
    return Pressure(
        some_avg10=float(some.get("avg10", 0)),
        some_avg60=float(some.get("avg60", 0)),
        some_avg300=float(some.get("avg300", 0)),
        some_total_us=int(some.get("total", 0)),
        full_avg10=float(full.get("avg10", 0)),
        full_avg60=float(full.get("avg60", 0)),
        full_avg300=float(full.get("avg300", 0)),
        full_total_us=int(full.get("total", 0)),
    )
