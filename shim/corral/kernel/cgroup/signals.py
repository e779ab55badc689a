"""Signals to every process of a cgroup, also to those forked while it is being done.

    SIGKILL, v2      one write to cgroup.kill (Linux >= 5.14), which the kernel makes atomic
    anything else    freeze, so that nothing forks or exits; list; signal each by pidfd; thaw

Source: kernel cgroup-v2.rst "cgroup.kill"; cgroup-v1/freezer-subsystem.rst.
"""

import contextlib
import errno
import os
import signal

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


def send(directory: str, number: int) -> list[int]:
    """Signal each process in and below a cgroup; returns the pids that took it.

    A pid is looked for again after it is held by a pidfd: by then it may have become another process.
    """
    sent = []
    for each in membership.subtree(directory):
        for pid in membership.pids(each):
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as e:
                if e.errno in (errno.ESRCH, errno.EINVAL):  # exited, or a pid of another namespace shown as 0
                    continue
                raise
            try:
                if pid in membership.pids(each):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, number)
                        sent.append(pid)
            finally:
                os.close(pidfd)
    return sent
