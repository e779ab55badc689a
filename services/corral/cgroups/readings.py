"""Counters of many cgroups again and again: who did not run since the last time is not read in full again.

A cgroup none of whose processes got any CPU time has used nothing more, and one counter tells that. Pressure is read
afresh all the same: who waits for CPU time gets none. What else may change, memory that the kernel takes back, a
process moved in by another hand, is seen when the reading has become as old as the caller allows.
"""

import threading
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
        self._lock = threading.Lock()
        self._forgotten = 0

    def forget(self, path: str) -> None:
        """Its limits have changed, or it is gone. A reading that is under way may be from before: it is not kept."""
        with self._lock:
            self._forgotten += 1
            self._kept.pop(path, None)

    def _keep(self, path: str, reading: _Kept, forgotten: int) -> None:
        with self._lock:
            if forgotten == self._forgotten:
                self._kept[path] = reading

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
        group, now_s, forgotten = self._open(path), time.monotonic(), self._forgotten
        if not max_age_s:
            return group.read()
        cpu_ns = group.cpu_ns()  # first: what it does from here on is news the next time
        kept = self._kept.get(path)
        if kept is not None and kept.cpu_ns == cpu_ns and now_s - kept.at_s < max_age_s:
            return group.with_pressure_now(kept.stats)
        stats = group.read()
        if cpu_ns is not None:
            self._keep(path, _Kept(stats, cpu_ns, now_s), forgotten)
        return stats
