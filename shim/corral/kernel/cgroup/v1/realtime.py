"""Real-time CPU time on v1. A new cgroup has none, and all children together no more of it than their parent.

Source: kernel scheduler/sched-rt-group.rst; kernel/sched/rt.c tg_rt_schedulable(), to_ratio().
"""

import errno
import os
from collections.abc import Sequence

from corral.kernel.cgroup import files
from corral.kernel.cgroup.resources import CpuLimits

RUNTIME = "cpu.rt_runtime_us"
PERIOD = "cpu.rt_period_us"
_SHIFT = 20
"""The kernel compares fractions of a CPU in units of 2**-20."""


def make_room(parents: Sequence[str], directory: str, wanted: CpuLimits) -> None:
    """Let a cgroup's parents, the nearest one last, have what it is to have beside those that they have already.

    None gets less than it had. Raises OSError(EINVAL) if there is not so much left.
    """
    missing: list[tuple[str, int]] = []
    need = _wanted(directory, wanted)
    for child, parent in zip((directory, *reversed(parents)), reversed(parents), strict=False):
        need += sum(_share(other) for other in _children(parent) if other != child)
        if _share(parent) < need:
            missing.append((parent, need))
    for parent, share in reversed(missing):
        runtime_us = -(-share * files.read_number(f"{parent}/{PERIOD}") >> _SHIFT)
        try:
            files.write(f"{parent}/{RUNTIME}", str(runtime_us))
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            why = f"there is not so much real-time CPU time left: with that, {runtime_us} us would be needed here"
            raise OSError(e.errno, why, f"{parent}/{RUNTIME}") from e


def _wanted(directory: str, wanted: CpuLimits) -> int:
    runtime_us, period_us = wanted.realtime_runtime_us, wanted.realtime_period_us
    if runtime_us is None:
        runtime_us = files.read_number(f"{directory}/{RUNTIME}", 0)
    if period_us is None:
        period_us = files.read_number(f"{directory}/{PERIOD}", 1_000_000)
    return _ratio(runtime_us, period_us)


def _share(directory: str) -> int:
    return _ratio(files.read_number(f"{directory}/{RUNTIME}", 0), files.read_number(f"{directory}/{PERIOD}", 1))


def _ratio(runtime_us: int, period_us: int) -> int:
    return (max(0, runtime_us) << _SHIFT) // max(1, period_us)


def _children(directory: str) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
