"""The cgroup below which all of ours lie: whose it is, and that it stays so.

    claim   at the start: make it, and mark it with our root directory      another's is refused
    keep    around each create: somebody may have removed it, and with it the mark and the limits

What is found below it and has no row is removed, so two engines must never have the same one.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from corral.cgroups.engine_limits import EngineLimits, restore
from corral.kernel.cgroup import OWNER, Driver
from corral.rpc.errors import FailedPrecondition
from corral.store import is_locked


@dataclass(frozen=True, slots=True)
class Parent:
    """See the module."""

    driver: Driver
    path: str
    owner: Path
    limits: EngineLimits

    def holds(self, path: str) -> bool:
        """Whether a cgroup lies below it."""
        return path.startswith(f"{self.path}/")

    def claim(self) -> None:
        """Make it ours.

        Raises FailedPrecondition if it belongs to another root directory, whose daemon runs or has cgroups below it;
        OSError.
        """
        holder = self.driver.claim(self.path, str(self.owner), _lives)
        if holder != str(self.owner):
            raise FailedPrecondition(
                f"the cgroups below {self.path} belong to the corral whose data is in {holder}: stop that one and"
                " remove its containers, or give this one another [cgroups] parent",
                reason="CGROUP_PARENT_TAKEN",
                metadata={"parent": self.path, "holder": holder},
            )

    def is_ours(self) -> bool:
        """Whether it is there, and has nobody else's mark. Raises OSError."""
        try:
            return self.driver.marked(self.path, OWNER) in ("", str(self.owner))
        except FileNotFoundError:
            return False

    def keep(self) -> None:
        """Have it, ours and with its limits, whatever somebody did to it. Raises as claim() does, CorralError."""
        if not self._is_whole():
            self.claim()
        restore(self.driver, self.path, self.limits)

    def _is_whole(self) -> bool:
        """Whether it is in every hierarchy, and has our mark."""
        try:
            is_marked = self.driver.marked(self.path, OWNER) == str(self.owner)
        except FileNotFoundError:
            return False
        # No Path: twice for each container, and that takes four times as long.
        directories = self.driver.open(self.path).directories
        return is_marked and all(os.path.exists(directory) for directory in directories)  # noqa: PTH110


def _lives(owner: str) -> bool:
    """Whether a daemon works on this root directory: it holds a lock there, see corral.daemon.roots."""
    return is_locked(Path(owner) / "lock")
