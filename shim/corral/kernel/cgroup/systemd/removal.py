"""What is left to read of a scope: systemd removes its cgroup as soon as the last process has ended.

It learns of that when the process's parent does, and is often faster. Kills by the OOM killer would be lost with the
cgroup, as the kernel has counted them only a moment before.

    v2   a cgroup counts for those below it: the scope is in a slice of its own (see names), which stays until it is
         stopped, and the count is read there
    v1   each counts for itself: who counts keeps the directory of the memory controller. systemd tries once to remove
         it, then those of devices and processes, and does not come again; from then on it is the scope's maker who does
         So is a sub-cgroup that the container's own process is in; of others their maker may want to be rid

Source: systemd src/shared/cgroup-setup.c cg_trim_everywhere().
"""

import contextlib
import os
from collections.abc import Iterable
from typing import Self

from corral.kernel.cgroup import membership
from corral.kernel.cgroup.systemd.names import SCOPE
from corral.kernel.cgroup.v1 import freezer
from corral.kernel.cgroup.v1.foothold import Foothold

_LATER = ("devices.list", "pids.max")
"""Files of those controllers whose directories systemd removes after that of memory."""


class Kept:
    """The directory of a v1 memory controller, which stays until close()."""

    __slots__ = ("_below", "_directory", "_footholds", "_later")

    def __init__(self, directory: str, later: str) -> None:
        """later: another directory of the scope, which systemd removes after this one; "" if there is none."""
        self._later = (later, _inode(later)) if later else ("", 0)
        self._directory, self._below = directory, 0
        self._footholds = [Foothold(directory)]

    @classmethod
    def of(cls, directory: str, paths: Iterable[str]) -> Self | None:
        """None if nobody else removes it, or if it cannot be kept, as its processes are known by their freezer.

        directory, paths: of the memory controller, and of all. Raises OSError.
        """
        if not directory.endswith(SCOPE) or _has(directory, freezer.STATE):
            return None
        others = [path for path in paths if path != directory]
        return cls(directory, next((path for path in others if any(_has(path, name) for name in _LATER)), ""))

    def keep_below(self, init: int) -> None:
        """Keep the sub-cgroup, too, that the container's own process is in; one that it has left no longer.

        A process that ends is told by its cgroup until its memory is free, but does not tell its cgroup any more.
        """
        with contextlib.suppress(OSError):  # it is gone already
            if init in membership.pids(self._directory):
                self._leave_below()
                return
            for fd in membership.below(self._directory):
                if init in membership.pids(where := f"/proc/self/fd/{fd}"):
                    self._step_into(where, os.fstat(fd).st_ino)
                    return

    def _step_into(self, directory: str, inode: int) -> None:
        if inode != self._below:
            self._leave_below()
            self._footholds.append(Foothold(directory))
            self._below = inode

    def is_left(self) -> bool:
        """Whether systemd has tried to remove it, and does so no more."""
        path, inode = self._later
        return not path or _inode(path) != inode

    def close(self) -> None:
        """Keep it no longer."""
        self._leave_below()
        self._footholds[0].close()

    def _leave_below(self) -> None:
        for foothold in self._footholds[1:]:
            foothold.close()
        del self._footholds[1:]
        self._below = 0


def _has(directory: str, name: str) -> bool:
    return os.path.exists(f"{directory}/{name}")  # noqa: PTH110 - a string, as everywhere here


def _inode(directory: str) -> int:
    try:
        return os.stat(directory).st_ino  # noqa: PTH116 - likewise
    except FileNotFoundError:
        return 0
