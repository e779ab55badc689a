"""One cgroup in all hierarchies: limits, counters, freezing, signals, removal."""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from corral.kernel.cgroup import files, membership, plans, signals, steps
from corral.kernel.cgroup.layout import Hierarchy
from corral.kernel.cgroup.oom import OomWatch
from corral.kernel.cgroup.resources import Resources
from corral.kernel.cgroup.v1 import freezer as freezer_v1
from corral.kernel.cgroup.v2 import freezer as freezer_v2

if TYPE_CHECKING:
    from pathlib import Path

    from corral.kernel.cgroup.pressure import PressureTrigger, PressureWatch
    from corral.kernel.cgroup.stats import Stats

SUBTREE_CONTROL = "cgroup.subtree_control"

_V1_NAMES = {"io": "blkio"}
_SHORTEST_S, _LONGEST_S = 0.0005, 0.05
"""Between two looks at whether killed processes are gone."""
_FREEZE_S = 1.0
"""For processes to stop before a signal; then they get it running, SIGKILL over and over while they fork."""
_ROUNDS = 100


class Cgroup:
    """A named cgroup. The object holds no kernel state: any number of them may stand for the same one."""

    __slots__ = ("_found", "_hierarchies", "directories", "path")

    def __init__(self, path: str, hierarchies: Sequence[Hierarchy]) -> None:
        """Name a cgroup by its path below each hierarchy's root; see Driver for how to make one."""
        self.path = path
        self.directories = tuple([f"{h.mount_point}{path}" for h in hierarchies])
        """Those of paths(), as strings."""
        self._hierarchies = hierarchies
        self._found: dict[str, tuple[str, int]] | None = None

    @property
    def _where(self) -> dict[str, tuple[str, int]]:
        if self._found is None:
            found = {}
            for hierarchy, directory in zip(self._hierarchies, self.directories, strict=True):
                for name in hierarchy.controllers:
                    found[_V1_NAMES.get(name, name)] = (directory, hierarchy.version)
                if hierarchy.version == 2:
                    found[plans.UNIFIED] = (directory, 2)
            self._found = found  # not before: another thread may ask
        return self._found

    def __repr__(self) -> str:
        return f"Cgroup({self.path!r})"

    def paths(self) -> "list[Path]":
        """The directories that a process joins, one per hierarchy. See membership.birthplace()."""
        from pathlib import Path

        return [Path(directory) for directory in self.directories]

    def exists(self) -> bool:
        """Whether any hierarchy still has it."""
        return any(os.path.exists(directory) for directory in self.directories)  # noqa: PTH110 - see _remove()

    def is_lasting(self) -> bool:
        """Whether it is there, and stays until it is removed."""
        return self.exists()

    def keeps_counts(self) -> bool:
        """Whether OOM kills can be counted: it is there, or has left them elsewhere."""
        return self.exists()

    def watch_oom(self, known: int = 0) -> OomWatch:
        """Count the OOM kills of a cgroup that was just made; without a memory controller there are none.

        known: so many were counted in another that was at its place.
        """
        found = zip(self._hierarchies, self.directories, strict=True)
        counting = (("", 2), *((where, h.version) for h, where in found if "memory" in h.controllers))
        return OomWatch.of(*counting[-1], known=known)

    def watch_pressure(self, trigger: "PressureTrigger") -> "PressureWatch":
        """Be told when processes wait as long as the trigger says. Raises OSError, see PressureWatch.open()."""
        from corral.kernel.cgroup.pressure import PressureWatch

        return PressureWatch.open(self._where.get(plans.UNIFIED, ("", 2))[0], trigger)

    def apply(self, wanted: Resources, *, fresh: bool = False) -> None:
        """Set limits, all or none: one that is refused leaves the others as they were.

        fresh: the cgroup was just made, and is thrown away if this fails; then nothing is restored.

        Raises OSError naming the file and the value: EINVAL, EBUSY or the like if the kernel refuses it,
        EOPNOTSUPP if this host cannot give it, ENOENT if the cgroup is gone.
        """
        steps.run(self.plan(wanted, fresh=fresh), undo=not fresh)

    def plan(self, wanted: Resources, *, fresh: bool = False) -> list[steps.Step]:
        """The steps that apply() takes, with nothing changed yet. Raises OSError for what can be seen to fail."""
        return plans.plan(self.path, self._where, wanted, fresh=fresh)

    def read(self) -> "Stats":
        """One reading of every counter. Raises OSError(ENOENT or ENODEV) if the cgroup is gone."""
        from corral.kernel.cgroup import counters

        return counters.read(self._where)

    def with_pressure_now(self, stats: "Stats", *, of_cpu_alone: bool = False) -> "Stats":
        """An older reading with the pressure of now: it grows without any CPU time, and goes down by itself.

        The very same one where it has done neither.
        """
        from corral.kernel.cgroup import counters

        return counters.with_pressure_now(self._where, stats, of_cpu_alone=of_cpu_alone)

    def cpu_ns(self) -> int | None:
        """CPU time used so far; None where no controller counts it. Raises OSError if the cgroup is gone."""
        from corral.kernel.cgroup import counters

        return counters.cpu_ns(self._where)

    def cpus(self) -> float | None:
        """How many CPUs' time it may use, by its own quota; None without one. Raises OSError if the cgroup is gone."""
        from corral.kernel.cgroup import counters

        return counters.cpus(self._where)

    def memory_limit(self) -> int:
        """Its own limit of memory in bytes; UNLIMITED without one. Raises OSError if the cgroup is gone."""
        from corral.kernel.cgroup import counters

        return counters.memory_limit(self._where)

    def pids_limit(self) -> int:
        """Its own limit of processes; UNLIMITED without one. Raises OSError if the cgroup is gone."""
        from corral.kernel.cgroup import counters

        return counters.pids_limit(self._where)

    def lift_memory_limit(self) -> None:
        """Let memory have no limit, and leave that of swap alone. Raises OSError."""
        if "memory" in self._where:
            from corral.kernel.cgroup.v1 import memory as memory_v1
            from corral.kernel.cgroup.v2 import memory as memory_v2

            directory, version = self._where["memory"]
            steps.run((memory_v1 if version == 1 else memory_v2).lift(directory))

    def has_room_for_limit(self, limit_bytes: int) -> bool:
        """Whether a limit of memory would kill nobody at once; what can be taken back for it is. Raises OSError.

        Of v1, which refuses such a limit by itself, always.
        """
        directory, version = self._where.get("memory", ("", 1))
        if version == 1:
            return True
        from corral.kernel.cgroup.v2 import memory as memory_v2

        return memory_v2.shrink(directory, limit_bytes) <= limit_bytes

    def freeze(self, timeout_s: float = 10.0) -> None:
        """Stop every process, and return when all have stopped. Raises OSError(ETIMEDOUT), thawed again."""
        deadline = time.monotonic() + timeout_s
        v1, v2 = self._freezers()
        # The v2 freezer is the better one, but on a hybrid host the processes may be in the v1 cgroup alone.
        if v2 and (not v1 or freezer_v2.is_populated(v2)):
            frozen = freezer_v2.freeze(v2, deadline)
        elif v1:
            frozen = freezer_v1.freeze(v1, deadline)
        else:
            raise steps.unsupported(self.path, "this host has no cgroup freezer")
        if not frozen:
            self.thaw()
            raise OSError(errno.ETIMEDOUT, f"processes still run after {timeout_s} s of freezing", self.path)

    def thaw(self) -> None:
        """Let every process run again; no error if none was frozen."""
        v1, v2 = self._freezers()
        if v2:
            freezer_v2.thaw(v2)
        if v1:
            freezer_v1.thaw(v1)

    def is_frozen(self) -> bool:
        """Whether every process has been stopped, by whichever version's freezer."""
        v1, v2 = self._freezers()
        return bool((v2 and freezer_v2.is_frozen(v2)) or (v1 and freezer_v1.is_frozen(v1)))

    def pids(self) -> list[int]:
        """Every process in it and below it; [] if it is gone."""
        return sorted({pid for directory in self._trackers() for pid in membership.pids_below(directory)})

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every process in it and below; none escapes by forking. Does not wait for their end.

        SIGKILL thaws a frozen cgroup; any other signal leaves it frozen, and waits until it is thawed if it is
        handled (on v2 a signal that is not, and so would end a process, ends it at once).
        Raises OSError(EPERM) if the caller itself is inside.
        """
        if self._occupied():
            self._send(number)

    def _occupied(self) -> bool:
        found = self.pids()
        if os.getpid() in found:
            raise OSError(errno.EPERM, "the process that was asked to do this is inside", self.path)
        return bool(found)

    def _send(self, number: int) -> None:
        was_frozen = frozen = self.is_frozen()
        if not was_frozen:
            with contextlib.suppress(OSError):  # no freezer, or one that is stuck: signal who can be seen
                self.freeze(_FREEZE_S)
                frozen = True
        trackers = [directory for directory in self._trackers() if directory]
        for _ in range(1 if frozen else _ROUNDS):
            if not signals.send(trackers, number) or number != signal.SIGKILL:
                break
        if number == signal.SIGKILL or not was_frozen:
            self.thaw()

    def remove(self, timeout_s: float = 10.0) -> None:
        """Kill what is inside and remove it with all sub-cgroups, from every hierarchy; no error if it is gone.

        Raises OSError(EBUSY) if processes outlive SIGKILL by timeout_s, as one stuck in the kernel does.
        """
        deadline, pause = time.monotonic() + timeout_s, _SHORTEST_S
        left = [directory for directory in self.directories if not _remove(directory)]
        while left:
            self._kill_for_good()
            left = [directory for directory in left if not _remove_below(directory)]
            if not left:
                return
            if time.monotonic() >= deadline:
                raise OSError(errno.EBUSY, f"processes {self.pids()} do not die; the cgroup stays", left[0])
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_S)

    def remove_empty(self) -> bool:
        """remove(), without waiting: False if there is anything inside, when a part of it may be gone."""
        return all(_remove(directory) for directory in self.directories)

    def undivide(self) -> None:
        """Remove what those who have ended have made below it, so that v2 takes processes in it again.

        Nothing is changed while there are any. Raises OSError.
        """
        if self.pids():
            return
        for directory in self.directories:
            _empty(directory)
        _, v2 = self._trackers()
        if v2 and (controllers := files.read(f"{v2}/{SUBTREE_CONTROL}").split()):
            files.write(f"{v2}/{SUBTREE_CONTROL}", " ".join(f"-{name}" for name in controllers))

    def _kill_for_good(self) -> None:
        if not self._occupied():
            return
        v1, v2 = self._trackers()
        only_in_v1 = set(membership.pids_below(v1)) - set(membership.pids_below(v2))
        if v2 and signals.kill_v2(v2) and not only_in_v1:
            self.thaw()  # what the v1 freezer holds cannot die
        else:
            self._send(signal.SIGKILL)

    def _freezers(self) -> tuple[str, str]:
        """The v1 and the v2 freezer's directory, "" for one that is not here."""
        v1, v2 = self._trackers()
        return v1 if _has(v1, freezer_v1.STATE) else "", v2 if _has(v2, freezer_v2.FREEZE) else ""

    def _trackers(self) -> tuple[str, str]:
        """The directories that tell the processes, one per version, "" for none.

        A process joins all hierarchies or none, so of v1 one is enough: the freezer's, if it is mounted.
        """
        v2, _ = self._where.get(plans.UNIFIED, ("", 2))
        any_v1 = next((directory for directory in self.directories if directory != v2), "")
        v1, version = self._where.get("freezer", (any_v1, 1))
        return v1 if version == 1 else "", v2


def _has(directory: str, name: str) -> bool:
    return bool(directory) and os.path.exists(f"{directory}/{name}")  # noqa: PTH110 - see _remove()


def _remove(directory: str, at: int | None = None) -> bool:
    """rmdir one directory; False if something in it is still alive."""
    try:
        os.rmdir(directory, dir_fd=at)  # no Path: ten for each container, and that takes a tenth of the time
    except FileNotFoundError:
        return True
    except OSError as e:
        if e.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True


def _remove_below(directory: str) -> bool:
    _empty(directory)
    return _remove(directory)


def _empty(directory: str) -> None:
    for _ in membership.below(directory, lambda parent, name: _remove(name, parent)):
        pass
