"""The OOM killer and a container: a score that spares its shim, and a count of whom it took.

The kernel counts its kills, and does not tell whom. An exec that ended by SIGKILL is said to be a victim only if
nobody else can have been: see OomCounter.claim().
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from corral.kernel.cgroup import OomWatch, membership
from corral.kernel.cgroup.systemd.removal import Kept
from corral.kernel.process import is_dying
from corral.oci.spec import Process
from corral.shim.loop import IN, Loop, Timer

_SHIM_SCORE = -998
_ORDINARY_SCORE = 0

_LOOK_AGAIN_S = (0.02, 0.1, 0.5)
"""A v1 kernel wakes who watches before it kills, and not once more when it has."""
_LOOK_BELOW_S = (0.0, 0.5, 5.0)
"""When a container's own process is surely in the sub-cgroup that it stays in: when its memory runs out there may be no
time left to keep that."""
_WOKEN_S = 1.0
"""How long after the kernel has told that memory ran out here a kill may be found that goes with it. Without a word
of that it was in a v1 sub-cgroup, some time ago."""
_DYING_S = 10.0
"""How long one that was killed may take to end; a kill that is older was somebody else's."""
_SETTLE_S = 0.05
"""How long after a kill was counted its victim is surely dying."""


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

    __slots__ = (
        "_kept",
        "_living",
        "_looks",
        "_loop",
        "_on_kill",
        "_report",
        "_settling",
        "_unclaimed",
        "_watch",
        "_woken_at",
        "kills",
    )

    def __init__(
        self,
        loop: Loop,
        cgroup_paths: Sequence[str],
        *,
        on_kill: Callable[[int], None],
        report: Callable[[Exception], None],
        living: Callable[[], list[int]] = list,
        uncounted: int | None = None,
    ) -> None:
        """uncounted: as an earlier counter had it, whose kills count, too.

        living: the pids of the processes that are known and have not ended, first the container's own; none after it.
        """
        self._living = living
        self._loop, self._on_kill, self._report = loop, on_kill, report
        self._watch: OomWatch | None = None
        self._kept: Kept | None = None
        self._looks: list[Timer] = []
        self._unclaimed: list[float] = []
        self._settling: Timer | None = None
        self._woken_at = 0.0
        self.kills = 0
        try:
            self._watch = OomWatch.open(cgroup_paths, uncounted=uncounted)
            if self._watch.wakes_before_the_kill:
                self._kept = Kept.of(self._watch.directory, cgroup_paths)
            for delay_s in _LOOK_BELOW_S if self._kept is not None else ():
                loop.call_later(delay_s, self._keep_below)
        except OSError as e:
            report(e)
        if self._watch is not None:
            loop.watch(self._watch.fileno(), IN, lambda _events: self._woken())

    @property
    def uncounted(self) -> int | None:
        """How many kills do not count, as they were before the container; None if it is not known."""
        return None if self._watch is None else self._watch.uncounted

    @property
    def is_awaited(self) -> bool:
        """Whether the cgroup has to be kept from systemd a little longer, for others to count in it, too."""
        return self._kept is not None and not self._kept.is_left()

    def count(self) -> int:
        """How many there were, looked up now."""
        self._count()
        return self.kills

    def claim(self, pid: int) -> bool:
        """Whether surely the OOM killer took an exec that has just ended by SIGKILL. Each kill is claimed once.

        The kernel counts a kill before it sends the signal, so by now it is known. Nothing is claimed while anybody
        else may have been the victim: init, with whom an exec ends in a pid namespace; another exec; a process that
        they have made, where there is any of that kind.
        """
        self._count()
        oldest = time.monotonic() - _DYING_S
        unclaimed, self._unclaimed = [at for at in self._unclaimed if at >= oldest], []
        if not unclaimed or self._watch is None:
            return False
        if self._watch.takes_all():
            self._unclaimed = unclaimed
            return True
        living = self._living()
        dying = [each for each in living if is_dying(each)]
        if not living or living[0] in dying or len(dying) >= len(unclaimed):
            return False
        if set(membership.pids_below(self._watch.directory)) - {pid, os.getpid(), *living}:
            return False
        self._unclaimed = unclaimed[1:]
        return True

    def tell(self) -> None:
        """Call on_kill if there is news. Whose kills these were nobody can know any more."""
        self._count()
        self._unclaimed.clear()

    def close(self) -> None:
        """Watch no longer; kills stays."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        if self._watch is not None:
            self._look_again_in(())
            if self._settling is not None:
                self._settling.cancel()
            self._loop.forget(self._watch.fileno())
            self._watch.close()
            self._watch = None

    def _woken(self) -> None:
        self._keep_below()
        self._count()
        if self._watch is not None and self._watch.wakes_before_the_kill:
            self._look_again_in(_LOOK_AGAIN_S)

    def _keep_below(self) -> None:
        if self._kept is not None and (living := self._living()):
            self._kept.keep_below(living[0])

    def _look_again_in(self, delays_s: Iterable[float]) -> None:
        for timer in self._looks:
            timer.cancel()
        self._looks = [self._loop.call_later(delay_s, self._count) for delay_s in delays_s]

    def _count(self) -> None:
        if self._watch is None:
            return
        try:
            if self._watch.has_news():
                self._woken_at = time.monotonic()
            kills = self._watch.count()
        except OSError as e:
            self._report(e)
            return
        if kills > self.kills:
            self._note(kills - self.kills)
            self.kills = kills
            self._on_kill(kills)

    def _note(self, kills: int) -> None:
        now = time.monotonic()
        if now - self._woken_at <= _WOKEN_S:
            self._unclaimed += [now] * kills
        if self._settling is None:
            self._settling = self._loop.call_later(_SETTLE_S, self._settle)

    def _settle(self) -> None:
        """A kill of which none of those who are known dies was of somebody else."""
        self._settling = None
        if not any(is_dying(pid) for pid in self._living()):
            self._unclaimed.clear()
