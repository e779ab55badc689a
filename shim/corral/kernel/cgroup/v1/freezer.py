"""The v1 freezer.

Source: kernel cgroup-v1/freezer-subsystem.rst.
"""

import time

from corral.kernel.cgroup import files, membership

STATE = "freezer.state"
FROZEN, THAWED = "FROZEN", "THAWED"

_POLL_S = 0.0005


def freeze(directory: str, deadline: float) -> bool:
    """Ask for FROZEN until it is reached; False if the deadline (time.monotonic) passes first.

    A process that forks while the kernel walks the group leaves it FREEZING; asking again walks it again.
    """
    while True:
        files.write(f"{directory}/{STATE}", FROZEN)
        if is_frozen(directory):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)


def thaw(directory: str) -> None:
    """Let the processes run again, if it is not gone with them."""
    try:
        files.write(f"{directory}/{STATE}", THAWED)
    except OSError as e:
        if not membership.gone(e):
            raise


def is_frozen(directory: str) -> bool:
    """Whether every process has stopped; not so of a cgroup that is gone."""
    try:
        return files.read(f"{directory}/{STATE}") == FROZEN
    except OSError as e:
        if not membership.gone(e):
            raise
        return False
