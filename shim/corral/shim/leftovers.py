"""Processes of a container beyond the ones its shim started."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from corral.kernel import process
from corral.kernel.cgroup import membership


def kill_leftovers(cgroup_paths: Iterable[Path], number: int, *, spare: int = 0) -> None:
    """Signal every process in the container's cgroup, but `spare`; a SIGKILL is repeated until none is left to fork.

    A cgroup that also holds the shim is not the container's own, and is left alone.
    """
    path = next(iter(cgroup_paths), None)
    if path is None:
        return
    signalled = {spare}
    while True:
        pids = membership.pids_below(str(path))
        fresh = [pid for pid in pids if pid not in signalled]
        if os.getpid() in pids or not fresh:
            return
        for pid in fresh:
            _signal(pid, number)
        signalled.update(fresh)
        if number != signal.SIGKILL:
            return


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        pidfd = process.pidfd_open(pid)
        try:
            process.send_signal(pidfd, number)
        finally:
            os.close(pidfd)
