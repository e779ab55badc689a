"""Time namespaces: the offsets of their clocks. Source: time_namespaces(7)."""

import os
from collections.abc import Iterable

from corral.kernel.syscalls import failure

CLOCKS = ("monotonic", "boottime")


def write_offsets(pid: int, offsets: Iterable[tuple[str, int, int]]) -> None:
    """Set clocks of the time namespace that process pid has made for its children, before the first is born.

    offsets: (clock, seconds, nanoseconds), relative to the host's. Raises OSError naming the clock: ERANGE where it
    would go below zero, or past the end of time.
    """
    path = f"/proc/{pid}/timens_offsets"
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for clock, seconds, nanoseconds in offsets:
            try:
                os.write(fd, f"{clock} {seconds} {nanoseconds}\n".encode())
            except OSError as e:
                raise failure(e.errno or 0, f"set the {clock} clock off by {seconds} s", path) from e
    finally:
        os.close(fd)
