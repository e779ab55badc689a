"""Processes of a container beyond the ones its shim started."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from corral.kernel import process
from corral.kernel.cgroup import membership
from corral.kernel.cgroup.v1 import freezer as freezer_v1
from corral.kernel.cgroup.v2 import freezer as freezer_v2

_PASSES = 3
_FREEZE_S = 0.5
_KILL_S = 1.0
"""The shim has more to do than to chase a container that forks faster than it is killed: who removes the cgroup ends
it."""


def let_die(cgroups: Sequence[str]) -> None:
    """Thaw what is frozen by cgroup v1, where a SIGKILL waits for that."""
    for each in cgroups:
        if Path(each, freezer_v1.STATE).exists():
            with contextlib.suppress(OSError):
                freezer_v1.thaw(each)


def kill_leftovers(cgroups: Sequence[str], number: int, *, spare: int = 0) -> None:
    """Signal every process in the container's cgroup, but `spare`.

    For a SIGKILL they are frozen meanwhile, so that none escapes by forking; where that can't be had it is repeated,
    for a second at most. A cgroup that also holds the shim is not the container's own, and is left alone.
    """
    if not cgroups:
        return
    directory = next((each for each in cgroups if Path(each, freezer_v1.STATE).exists()), cgroups[0])
    pids = membership.pids_below(directory)
    if os.getpid() in pids:
        return
    if number != signal.SIGKILL:
        _signal(pids, number, spare)
        return
    give_up_at = time.monotonic() + _KILL_S
    while set(pids) - {spare} and time.monotonic() < give_up_at:
        with _frozen(directory) as frozen:
            _signal(membership.pids_below(directory), number, spare)
        if frozen:
            return
        pids = membership.pids_below(directory)


def kill_offspring(leader: int, cgroups: Sequence[str]) -> None:
    """Kill what a child of this process has made, which leads a session.

    All of its session, and whose parent is one of these: only who has left both, as a daemon does, is not found. None
    is stopped meanwhile, as it would stay that if this process were killed; who was made meanwhile is found afterwards.
    """
    killed: set[int] = set()
    for _ in range(_PASSES):
        pids = membership.pids_below(cgroups[0]) if cgroups else _all_pids()
        found = _offspring(leader, pids) - killed
        if not found:
            return
        _signal(found, signal.SIGKILL, leader)
        killed |= found


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - names are wanted


def _offspring(leader: int, pids: Iterable[int]) -> set[int]:
    parents: dict[int, int] = {}
    found = {leader}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[pid], session = process.lineage(pid)
            if session == leader:
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {leader}


@contextlib.contextmanager
def _frozen(directory: str) -> Iterator[bool]:
    """Stop everything in a cgroup for the length of a block; whether that could be had."""
    is_v1, is_v2 = (Path(directory, name).exists() for name in (freezer_v1.STATE, freezer_v2.FREEZE))
    if not is_v1 and not is_v2:
        yield False
        return
    freeze, thaw = (freezer_v1.freeze, freezer_v1.thaw) if is_v1 else (freezer_v2.freeze, freezer_v2.thaw)
    try:
        yield freeze(directory, time.monotonic() + _FREEZE_S)
    finally:
        thaw(directory)


def _signal(pids: Iterable[int], number: int, spare: int) -> None:
    for pid in pids:
        if pid != spare:
            with contextlib.suppress(ProcessLookupError):
                pidfd = process.pidfd_open(pid)
                try:
                    process.send_signal(pidfd, number)
                finally:
                    os.close(pidfd)
