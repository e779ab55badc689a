"""Processes that are not ours alone to wait for, named by pid and start time, and held by pidfd."""

import asyncio
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from corral.kernel.process import pidfd_open, send_signal, start_time


@dataclass(frozen=True, slots=True)
class Identity:
    """A process named for good: pids are reused, a pid with its start time (field 22 of /proc/<pid>/stat) is not."""

    pid: int
    start_time: int

    @property
    def lives(self) -> bool:
        """Whether the process has not ended; one that nobody reaped yet still counts."""
        try:
            return start_time(self.pid) == self.start_time
        except (FileNotFoundError, ProcessLookupError):
            return False

    @contextmanager
    def held(self) -> Iterator[int | None]:
        """A pidfd of the process for the length of a block; None if it has ended."""
        try:
            pidfd = pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            # Only now: the pid may have been another's when it was opened, but not afterwards.
            yield pidfd if self.lives else None
        finally:
            os.close(pidfd)

    @property
    def runs(self) -> bool:
        """Whether the process has not ended; one that only nobody reaped yet has."""
        with self.held() as pidfd:
            if pidfd is None:
                return False
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return not poll.poll(0)

    def signal(self, number: int) -> bool:
        """Send it a signal; whether it was there."""
        with self.held() as pidfd, suppress(ProcessLookupError):
            if pidfd is not None:
                send_signal(pidfd, number)
                return True
        return False

    async def kill(self, *, within_s: float) -> bool:
        """SIGKILL it and wait for its end; whether it has ended. A process that is already gone is fine."""
        with self.held() as pidfd:
            if pidfd is None:
                return True
            with suppress(ProcessLookupError):
                send_signal(pidfd, signal.SIGKILL)
            try:
                async with asyncio.timeout(within_s):
                    await ended(pidfd)
            except TimeoutError:
                return False
        return True


async def ended(pidfd: int) -> None:
    """Return when the process of the pidfd has ended (and may still be unreaped)."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(pidfd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(pidfd)


def reap(pidfd: int) -> None:
    """Collect a child that has ended; never waits."""
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
