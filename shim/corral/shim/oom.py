"""The OOM killer and a container: a score that spares its shim, and a count of whom it took."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from corral.kernel.cgroup import OomWatch
from corral.oci.spec import Process
from corral.shim.loop import IN, Loop, Timer

_SHIM_SCORE = -998
_ORDINARY_SCORE = 0

_LOOK_AGAIN_S = (0.02, 0.1, 0.5)
"""A v1 kernel wakes who watches before it kills, and not once more when it has."""
_DYING_S = 10.0
"""How long one that was killed may take to end; a kill that is older was somebody else's."""


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

    __slots__ = ("_looks", "_loop", "_on_kill", "_report", "_unclaimed", "_watch", "kills")

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
        self._looks: list[Timer] = []
        self._unclaimed: list[float] = []
        self.kills = 0
        try:
            self._watch = OomWatch.open(cgroup_paths, uncounted=uncounted)
        except OSError as e:
            report(e)
            return
        loop.watch(self._watch.fileno(), IN, lambda _events: self._woken())

    @property
    def uncounted(self) -> int | None:
        """How many kills do not count, as they were before the container; None if it is not known."""
        return None if self._watch is None else self._watch.uncounted

    def count(self) -> int:
        """How many there were, looked up now."""
        self._count()
        return self.kills

    def claim(self) -> bool:
        """Whether it was the OOM killer who took a process that has just ended by SIGKILL. Each kill is claimed once.

        The kernel counts a kill before it sends the signal, so by now it is known, and tells no more of it than that.
        """
        self._count()
        oldest = time.monotonic() - _DYING_S
        self._unclaimed = [at for at in self._unclaimed if at >= oldest]
        return bool(self._unclaimed and self._unclaimed.pop())

    def tell(self) -> None:
        """Call on_kill if there is news."""
        self._count()

    def close(self) -> None:
        """Watch no longer; kills stays."""
        if self._watch is not None:
            self._look_again_in(())
            self._loop.forget(self._watch.fileno())
            self._watch.close()
            self._watch = None

    def _woken(self) -> None:
        self._count()
        if self._watch is not None and self._watch.wakes_before_the_kill:
            self._look_again_in(_LOOK_AGAIN_S)

    def _look_again_in(self, delays_s: Iterable[float]) -> None:
        for timer in self._looks:
            timer.cancel()
        self._looks = [self._loop.call_later(delay_s, self._count) for delay_s in delays_s]

    def _count(self) -> None:
        if self._watch is None:
            return
        try:
            kills = self._watch.count()
        except OSError as e:
            self._report(e)
            return
        if kills > self.kills:
            self._unclaimed += [time.monotonic()] * (kills - self.kills)
            self.kills = kills
            self._on_kill(kills)
