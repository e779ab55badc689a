"""Whom the crash test kills: processes of one daemon under test, each held by a pidfd before it is signalled.

Shims are those that the records of its bundles name, by pid and start time; zygotes are what made them, and what its
tasks service has made.
"""

import contextlib
import json
import os
import select
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support import sweep
from support.corrald import Corrald

from corral.kernel.process import pidfd_open, start_time

GONE_S = 5.0


@dataclass(frozen=True, slots=True)
class Victim:
    """A process, named for good."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> "Victim":
        """Raises FileNotFoundError, ProcessLookupError if there is none."""
        return cls(pid, start_time(pid))

    @property
    def runs(self) -> bool:
        with contextlib.suppress(OSError):
            return start_time(self.pid) == self.start_time and _stat(self.pid)[0] not in "ZX"
        return False


@dataclass(frozen=True, slots=True)
class ShimVictim:
    """The shim of a container."""

    container: str
    process: Victim

    @property
    def is_armed(self) -> bool:
        """Whether it is to kill itself somewhere, as the zygote that made it was told."""
        with contextlib.suppress(OSError):
            return b"CORRAL_FAILPOINTS=" in Path(f"/proc/{self.process.pid}/environ").read_bytes()
        return False


def kill(victims: Sequence[Victim]) -> int:
    """SIGKILL to all at once, those that still run, and wait until they are gone; returns how many there were."""
    with contextlib.ExitStack() as held:
        pidfds = [held.enter_context(opened) for opened in map(_held, victims)]
        alive = [pidfd for pidfd in pidfds if pidfd >= 0]
        killed = 0
        for pidfd in alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                killed += 1
        for pidfd in alive:
            select.select([pidfd], [], [], GONE_S)
        return killed


@contextlib.contextmanager
def _held(victim: Victim) -> Iterator[int]:
    try:
        pidfd = pidfd_open(victim.pid)
    except ProcessLookupError:
        yield -1
        return
    try:
        yield pidfd if victim.runs else -1
    finally:
        os.close(pidfd)


def shims(daemon: Corrald) -> list[ShimVictim]:
    """Those that the records of bundles name, dead or alive."""
    found = []
    for record in (daemon.state / "shim").glob("*/*/record.json"):
        with contextlib.suppress(OSError, ValueError):  # it is on its way out
            content = json.loads(record.read_bytes())
            process = Victim(content["shim_pid"], content["shim_start_time"])
            found.append(ShimVictim(record.parent.name, process))
    return found


def zygotes(daemon: Corrald) -> list[Victim]:
    """The one of the tasks service, and those of services that were killed, which stay for their shims."""
    victims = []
    for pid in sorted(sweep.zygotes(daemon.place.root)):
        with contextlib.suppress(OSError):
            victims.append(Victim.of(pid))
    return victims


def zygote_of(shim: ShimVictim) -> int | None:
    """The pid of a shim's zygote, if that still lives."""
    with contextlib.suppress(OSError):
        parent = sweep.parent_of(shim.process.pid)
        if Path(f"/proc/{parent}/comm").read_text("utf-8") == "corral-zygote\n":
            return parent
    return None


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
