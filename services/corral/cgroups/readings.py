"""Counters of many cgroups again and again: who did not run since the last time is not read in full again.

A cgroup none of whose processes got any CPU time has used nothing more, and one counter tells that. What may change all
the same, memory that the kernel takes back from it, averages of pressure that go down, is seen when the reading has
become as old as the caller allows.
"""

import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from corral.kernel.cgroup import Driver, Stats
from corral.kernel.cgroup.membership import gone


class _Kept(NamedTuple):
    stats: Stats
    cpu_ns: int
    at_s: float


class Readings:
    """Of the cgroups of a driver, by path. To be used on any thread."""

    def __init__(self, driver: Driver) -> None:
        self._open = lru_cache(maxsize=1024)(driver.open)
        self._kept: dict[str, _Kept] = {}

    def forget(self, path: str) -> None:
        """Its limits have changed, or it is gone."""
        self._kept.pop(path, None)

    def read(self, paths: Mapping[str, str], max_age_s: float) -> Iterator[tuple[str, int, Stats]]:
        """A reading of each, by id and with its time; those that vanish meanwhile are left out. Raises OSError.

        max_age_s: of a cgroup that did not run since, a reading may be so old.
        """
        for id_, path in paths.items():
            try:
                yield id_, time.time_ns(), self._reading(path, max_age_s)
            except OSError as e:
                if not gone(e):
                    raise
                self.forget(path)

    def _reading(self, path: str, max_age_s: float) -> Stats:
        group, now_s = self._open(path), time.monotonic()
        if not max_age_s:
            return group.read()
        cpu_ns = group.cpu_ns()  # first: what it does from here on is news the next time
        kept = self._kept.get(path)
        if kept is not None and kept.cpu_ns == cpu_ns and now_s - kept.at_s < max_age_s:
            return kept.stats
        stats = group.read()
        if cpu_ns is not None:
            self._kept[path] = _Kept(stats, cpu_ns, now_s)
        return stats
