"""The cgroup below which all of ours lie: whose it is, and that it stays so.

    claim   at the start: make it, and mark it with our root directory      another's is refused
    keep    around each create: somebody may have removed it, and with it the mark and the limits

What is found below it and has no row is removed, so two engines must never have the same one.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from corral.cgroups.engine_limits import EngineLimits, restore
from corral.cgroups.store import Key
from corral.kernel.cgroup import OWNER, Driver, check_path
from corral.kernel.cgroup.systemd.names import (
    ROOT,
    SCOPE,
    scope_alone_in,
    slice_of_its_own,
    slice_path,
    unit_at,
)
from corral.rpc.errors import FailedPrecondition, InvalidArgument
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

    def place(self, key: Key) -> str:
        """The path of a cgroup below it."""
        return f"{self.path}/{key.namespace}/{key.id}"

    def place_below(self, other: str, key: Key) -> str:
        """The path of a cgroup below another parent, of a caller's choice. Raises InvalidArgument."""
        return f"{self._other(other)}/{key.id}"

    def _other(self, path: str) -> str:
        try:
            check_path(path)
        except OSError as e:
            raise InvalidArgument(f"cgroup parent {path!r}: {e.strerror}", reason="BAD_PARENT") from e
        if f"{path}/".startswith(f"{self.path}/"):
            raise InvalidArgument(f"a cgroup parent must lie outside of {self.path}", reason="BAD_PARENT")
        return path

    def unit(self, path: str) -> str:
        """The unit of systemd whose cgroup is at a path of ours; "" for none."""
        return ""

    def groups(self) -> list[str]:
        """The paths of all cgroups that are below it."""
        return [
            f"{self.path}/{namespace}/{name}"
            for namespace in sorted(self.driver.list(self.path))
            for name in sorted(self.driver.list(f"{self.path}/{namespace}"))
        ]

    def prune(self) -> None:
        """Remove what of it is empty, if it is ours."""
        if not self.is_ours():
            return
        for namespace in self.driver.list(self.path):
            self.driver.prune(f"{self.path}/{namespace}")
        self.driver.prune(self.path)

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

    def keep(self, *, inhabited: bool = False) -> None:
        """Have it, ours and with its limits, whatever somebody did to it. Raises as claim() does, CorralError.

        inhabited: there is a cgroup below, so it is in every hierarchy.
        """
        if not self._is_marked() or not (inhabited or self._is_everywhere()):
            self.claim()
        restore(self.driver, self.path, self.limits)

    def keep_for_one_more(self) -> None:
        """keep(), before a cgroup is made below: that it is in every hierarchy shows when that is done (on_orphan)."""
        self.keep(inhabited=not (self.driver.asks_systemd or self.limits.given()))

    def _is_marked(self) -> bool:
        """Whether it has our mark."""
        try:
            return self.driver.marked(self.path, OWNER) == str(self.owner)
        except FileNotFoundError:
            return False

    def _is_everywhere(self) -> bool:
        """Whether it is in every hierarchy."""
        # No Path: ten for each container, and that takes four times as long.
        directories = self.driver.open(self.path).directories
        return all(os.path.exists(directory) for directory in directories)  # noqa: PTH110


class Slice(Parent):
    """The parent as a slice of systemd, and the cgroups below as its scopes.

    systemd knows a unit by its name alone, wherever it is, so that tells the engine and the namespace of a scope, too:
    corral-<engine>-<namespace>-<id>.scope, the first two as hashes. Other scopes in the slice are not ours. On v2 each
    is in a slice of its own (see corral.kernel.cgroup.systemd.removal).
    """

    __slots__ = ()

    def place(self, key: Key) -> str:
        """The path of a cgroup below it."""
        return self._within(self.path, key)

    def place_below(self, other: str, key: Key) -> str:
        """The path of a cgroup below another slice, of a caller's choice. Raises InvalidArgument."""
        try:
            path = slice_path(other)
        except ValueError as e:
            why = f'cgroup parent: {e}, as the driver is systemd: "x-y.slice" is the slice y within x'
            raise InvalidArgument(why, reason="BAD_PARENT") from e
        return self._within(self._other(path) if path else path, key)

    def _within(self, path: str, key: Key) -> str:
        scope = self._scope(key)
        memory = self.driver.layout.of("memory")
        if memory is None or memory.version == 1:
            return f"{path}/{scope}"
        return f"{path}/{slice_of_its_own(scope, path.rpartition('/')[2] or ROOT)}/{scope}"

    def _scope(self, key: Key) -> str:
        return f"{self._ours()}{_hash(key.namespace)}-{key.id}{SCOPE}"

    def _ours(self) -> str:
        """How the names of our scopes begin."""
        return f"corral-{_hash(str(self.owner))}-"

    def unit(self, path: str) -> str:
        """The unit of systemd whose cgroup is at a path of ours; "" for none."""
        return unit_at(path)

    def groups(self) -> list[str]:
        """The paths of all our scopes that are below it, and of those whose slices are."""
        found = {name if name.endswith(SCOPE) else scope_alone_in(name): name for name in self.driver.list(self.path)}
        within, ours = self.path.rpartition("/")[2], self._ours()
        return [
            f"{self.path}/{name}" if name == scope else f"{self.path}/{name}/{scope}"
            for scope, name in sorted(found.items())
            if scope.startswith(ours) and name in (scope, slice_of_its_own(scope, within))
        ]

    def prune(self) -> None:
        """Remove it, if it is ours and empty."""
        if self.is_ours():
            self.driver.prune(self.path)


def _hash(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def _lives(owner: str) -> bool:
    """Whether a daemon works on this root directory: it holds a lock there, see corral.daemon.roots."""
    return is_locked(Path(owner) / "lock")
