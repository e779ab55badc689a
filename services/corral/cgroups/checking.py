"""Rows and cgroups compared while the leaf runs."""

from collections.abc import Sequence
from functools import partial

from corral.cgroups.groups import Groups
from corral.cgroups.parent import Parent
from corral.cgroups.store import Record, State
from corral.kernel.cgroup import Driver
from corral.rpc.blocking import run_blocking
from corral.rpc.checking import Found


class Checker:
    """See the module."""

    def __init__(self, driver: Driver, groups: Groups, parent: Parent) -> None:
        self._driver = driver
        self._groups = groups
        self._parent = parent

    async def look(self) -> Sequence[Found]:
        """Cgroups below our parent without a row, rows whose cgroup is gone, and cgroups that were never finished."""
        cgroups = await run_blocking(lambda: self._parent.groups() if self._parent.is_ours() else [])
        records = self._groups.rows()  # last: a cgroup that is being made has its row after it
        known = {record.path: record for record in records}
        found = [self._stray(path) for path in cgroups if path not in known]
        gone = await run_blocking(lambda: [r for r in records if not self._driver.open(r.path).exists()])
        return found + [self._gone(record) for record in gone if not self._may_be_gone(record)]

    def _may_be_gone(self, record: Record) -> bool:
        """A scope goes with its container, and comes again with it."""
        return record.state is State.READY and bool(self._parent.unit(record.path))

    def _stray(self, path: str) -> Found:
        return Found(
            f"cgroup {path}",
            "is there, but nobody made it here",
            "repair kills what is in it and removes it",
            partial(self._groups.remove_stray, path),
        )

    def _gone(self, record: Record) -> Found:
        problem = "is gone" if record.state is State.READY else "was never finished"
        return Found(
            f"cgroup {record.path}", problem, "repair forgets it", partial(self._groups.forget_gone, record.key)
        )
