"""The OOM killer and a container: a score that spares its shim, and a count of whom it took."""

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from corral.kernel.cgroup import OomWatch
from corral.oci.spec import Process
from corral.shim.loop import IN, Loop

_SHIM_SCORE = -998
_ORDINARY_SCORE = 0


def protect_this_process() -> None:
    """The container should be killed before its shim is; a host may not allow to ask for that."""
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d" % _SHIM_SCORE)
        finally:
            os.close(fd)


def with_ordinary_score(process: Process) -> Process:
    """Unless it says otherwise a process must not inherit the lowered score of its shim."""
    return process if process.oom_score_adj is not None else replace(process, oom_score_adj=_ORDINARY_SCORE)


class OomCounter:
    """Counts OOM kills in a cgroup; on_kill gets the new count. A host where they can't be watched has none."""

    __slots__ = ("_loop", "_on_kill", "_report", "_watch", "kills")

    def __init__(
        self,
        loop: Loop,
        cgroup_paths: Iterable[Path],
        *,
        on_kill: Callable[[int], None],
        report: Callable[[Exception], None],
        uncounted: int | None = None,
    ) -> None:
        """uncounted: as an earlier counter had it, whose kills count, too."""
        self._loop, self._on_kill, self._report = loop, on_kill, report
        self._watch: OomWatch | None = None
        self.kills = 0
        try:
            self._watch = OomWatch.open(cgroup_paths, uncounted=uncounted)
        except OSError as e:
            report(e)
            return
        loop.watch(self._watch.fileno(), IN, lambda _events: self._count())

    @property
    def uncounted(self) -> int | None:
        """How many kills do not count, as they were before the container; None if it is not known."""
        return None if self._watch is None else self._watch.uncounted

    def count(self) -> int:
        """How many there were, looked up now."""
        self._count()
        return self.kills

    def tell(self) -> None:
        """Call on_kill if there is news."""
        self._count()

    def close(self) -> None:
        """Watch no longer; kills stays."""
        if self._watch is not None:
            self._loop.forget(self._watch.fileno())
            self._watch.close()
            self._watch = None

    def _count(self) -> None:
        if self._watch is None:
            return
        try:
            kills = self._watch.count()
        except OSError as e:
            self._report(e)
            return
        if kills > self.kills:
            self.kills = kills
            self._on_kill(kills)
