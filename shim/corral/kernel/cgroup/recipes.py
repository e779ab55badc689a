"""What is written to cgroups that were just made: planned once for each set of limits, of which most have the same few.

A new cgroup is like any other, so what a plan looks up in it is the same each time. Not so where there are limits of
devices, whose files come and go: these are planned anew.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from corral.kernel.cgroup import steps
from corral.kernel.cgroup.group import Cgroup
from corral.kernel.cgroup.resources import IoLimits, Resources
from corral.kernel.cgroup.steps import Step, Write

_MOST = 64
"""Sets of limits that are remembered."""


class _Writes(NamedTuple):
    """To one file: in which of a cgroup's directories it is, its name there, and the values in order."""

    directory: int
    name: str
    values: tuple[str, ...]


class Recipes:
    """Of one layout's cgroups."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Resources, Sequence[_Writes]]] = {}

    def apply(self, group: Cgroup, wanted: Resources) -> None:
        """Set the limits of a cgroup that was just made, and is thrown away if this fails. Raises as Cgroup.apply()."""
        known = self._known.get(id(wanted))
        if known is None:
            planned = group.plan(wanted, fresh=True)
            steps.run(planned, undo=False)
            self._learn(group, wanted, planned)
        else:
            for at, name, values in known[1]:
                steps.write_each(f"{group.directories[at]}/{name}", values)

    def _learn(self, group: Cgroup, wanted: Resources, planned: Sequence[Step]) -> None:
        if wanted.io != IoLimits() or wanted.hugetlb or wanted.rdma or wanted.unified:
            return
        if not all(type(step) is Write for step in planned):
            return
        ours = {directory: number for number, directory in enumerate(group.directories)}
        recipe = []
        for path, writes in groupby((step for step in planned if isinstance(step, Write)), lambda write: write.path):
            directory, _, name = path.rpartition("/")
            recipe.append(_Writes(ours[directory], name, tuple(write.value for write in writes)))
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[id(wanted)] = (wanted, recipe)  # which it is kept by, so that no other gets its id
