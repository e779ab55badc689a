"""What is mounted below a directory, in the mount namespace of this process."""

import os
import re
from pathlib import Path

_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


def mounts_below(directory: Path) -> list[Path]:
    """Mount points in it, not itself, the last one mounted first. Blocking.

    They begin as `directory` does, though that may lead through symbolic links, of which the kernel's list knows none.

    Source: proc_pid_mountinfo(5); blanks and backslashes are written as three octal digits.
    """
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    plain = (_OCTAL.sub(lambda digits: bytes([int(digits[1], 8)]), line.split()[4]) for line in reversed(lines))
    points = (Path(os.fsdecode(path)) for path in plain)
    real = directory.resolve()
    return [directory / point.relative_to(real) for point in points if real in point.parents]
