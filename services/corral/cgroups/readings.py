"""Counters of many cgroups again and again: who did not run since the last time is not read in full again.

A cgroup none of whose processes got any CPU time has used nothing more, and one counter tells that. Pressure is read
afresh all the same: who waits for CPU time gets none, and who waits for a disk may do so still. But nobody begins to
wait for a disk or for memory without having run. So where nobody did, that did not grow, and its averages are at 0,
nobody waits, and it is not looked at until somebody has run.

What else may change, memory that the kernel takes back, a process moved in by another hand, is seen when the reading
has become as old as the caller allows.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from corral.kernel.cgroup import Driver, Pressure, Stats
from corral.kernel.cgroup.membership import gone


class _Kept(NamedTuple):
    stats: Stats
    cpu_ns: int
    at_s: float
    is_calm: bool
    """Nobody waits for memory or a disk."""


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

    def read[K](self, paths: Mapping[K, str], max_age_s: float) -> Iterator[tuple[K, int, Stats]]:
        """A reading of each, by key and with its time; those that vanish meanwhile are left out. Raises OSError.

        Where nothing has changed it is the very same one as before.
        max_age_s: of a cgroup that did not run since, a reading may be so old.
        """
        for key, path in paths.items():
            try:
                yield key, time.time_ns(), self._reading(path, max_age_s)
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
        if kept is not None and kept.cpu_ns != cpu_ns:
            kept = None
        if kept is not None and now_s - kept.at_s < max_age_s:
            stats, at_s = group.with_pressure_now(kept.stats, of_cpu_alone=kept.is_calm), kept.at_s
        else:
            stats, at_s = group.read(), now_s
            if kept is not None and stats == kept.stats:
                stats = kept.stats
        if cpu_ns is not None:
            is_calm = kept is not None and _are_calm(kept.stats, stats)
            reading = _Kept(stats, cpu_ns, at_s, is_calm)
            if reading != kept:
                self._keep(path, reading, forgotten)
        return stats


def _are_calm(before: Stats, now: Stats) -> bool:
    """Whether between two readings nobody waited for memory or a disk, nor did a while ago."""
    return all(was == is_now and _is_over(is_now) for was, is_now in zip(_waits(before), _waits(now), strict=True))


def _waits(stats: Stats) -> tuple[Pressure | None, Pressure | None]:
    return stats.memory.pressure if stats.memory else None, stats.io_pressure


def _is_over(pressure: Pressure | None) -> bool:
    return pressure is None or not (pressure.some_avg10 or pressure.some_avg60 or pressure.some_avg300)
