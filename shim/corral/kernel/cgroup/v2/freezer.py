"""The v2 freezer, which is no controller: every cgroup but the root has it, on hybrid hosts too.

Source: kernel cgroup-v2.rst "cgroup.freeze", "cgroup.events".
"""

import os
import select
import time

from corral.kernel.cgroup import files, membership

FREEZE = "cgroup.freeze"
EVENTS = "cgroup.events"


def freeze(directory: str, deadline: float) -> bool:
    """Freeze and wait for it; False if the deadline (time.monotonic) passes first."""
    files.write(f"{directory}/{FREEZE}", "1")
    fd = os.open(f"{directory}/{EVENTS}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        changes = select.poll()
        changes.register(fd, select.POLLPRI)
        while not _flag(os.pread(fd, 4096, 0), "frozen"):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            changes.poll(left * 1000)
        return True
    finally:
        os.close(fd)


def thaw(directory: str) -> None:
    """Let the processes run again, if it is not gone with them."""
    try:
        files.write(f"{directory}/{FREEZE}", "0")
    except OSError as e:
        if not membership.gone(e):
            raise


def is_frozen(directory: str) -> bool:
    """Whether every process has stopped; not so of a cgroup that is gone."""
    try:
        return _flag(files.read_bytes(f"{directory}/{EVENTS}"), "frozen")
    except OSError as e:
        if not membership.gone(e):
            raise
        return False


def is_populated(directory: str) -> bool:
    """Whether there is a live process in the cgroup or below it."""
    return _flag(files.read_bytes(f"{directory}/{EVENTS}"), "populated")


def _flag(events: bytes, name: str) -> bool:
    return bool(files.flat_keyed(events.decode()).get(name))
