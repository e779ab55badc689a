"""Signals to every process of a cgroup, also to those forked while it is being done.

    in general                freeze, so that nothing forks or exits; list; signal each by pidfd; thaw
    SIGKILL before removal    on v2 one write to cgroup.kill (Linux >= 5.14), which the kernel makes atomic

cgroup.kill is for cgroups that will take no process again: one born there afterwards by CLONE_INTO_CGROUP is killed
too, since the kernel compares the kill count of the parent's cgroup with that of the new one (seen on Linux 6.18).

Source: kernel cgroup-v2.rst "cgroup.kill"; cgroup-v1/freezer-subsystem.rst.
"""

import errno
import os
import signal
from collections.abc import Iterable

from corral.kernel.cgroup import files, membership

KILL = "cgroup.kill"


def kill_v2(directory: str) -> bool:
    """Kill everything in and below a v2 cgroup, frozen or not; False if it is gone or the kernel is too old."""
    try:
        files.write(f"{directory}/{KILL}", "1")
    except OSError as e:
        if not membership.gone(e):
            raise
        return False
    return True


def send(directories: Iterable[str], number: int) -> list[int]:
    """Signal each process in and below some cgroup directories once; returns the pids that took it.

    A pid is looked for again after it is held by a pidfd: by then it may have become another process.
    """
    sent: list[int] = []
    for top in directories:
        for directory in membership.subtree(top):
            for pid in membership.pids(directory):
                if pid not in sent and _send(directory, pid, number):
                    sent.append(pid)
    return sent


def _send(directory: str, pid: int, number: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as e:
        if e.errno in (errno.ESRCH, errno.EINVAL):  # exited, or a pid of another namespace, shown as 0
            return False
        raise
    try:
        if pid not in membership.pids(directory):
            return False
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True
