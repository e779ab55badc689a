"""Being told when the processes of a cgroup wait for want of CPU time, memory or I/O.

    trigger     "some 150000 2000000" written to memory.pressure, and the file held open
    news        the file reports EPOLLPRI, at most once in each window, and is quiet again once somebody has polled it

Of a hybrid host's cgroups it is the v2 one that knows of all its processes' waits, whatever hierarchy limits them.

Source: kernel accounting/psi.rst "Monitoring for pressure thresholds", cgroup-v2.rst "cpu.pressure".
"""

import contextlib
import errno
import os
import select
from dataclasses import dataclass
from typing import Self

from corral.kernel.cgroup import steps

RESOURCES = ("cpu", "memory", "io")
LONGEST_WINDOW_US = 10_000_000


@dataclass(frozen=True, slots=True)
class PressureTrigger:
    """Processes have waited so long within a window."""

    resource: str
    """One of RESOURCES."""
    stall_us: int
    window_us: int
    full: bool = False
    """All of them at once, not just some."""

    def line(self) -> str:
        """As the kernel takes it."""
        return f"{'full' if self.full else 'some'} {self.stall_us} {self.window_us}"

    def check(self, path: str) -> None:
        """Raise OSError(EINVAL) for what no kernel takes."""
        if self.resource not in RESOURCES:
            raise steps.invalid(path, f"there is no pressure of {self.resource!r}: use one of {', '.join(RESOURCES)}")
        if not 0 < self.stall_us <= self.window_us <= LONGEST_WINDOW_US:
            what = f"{self.stall_us} us within {self.window_us} us"
            raise steps.invalid(path, f"a pressure of {what}: the wait must fit in the window, and that in 10 s")


class PressureWatch:
    """One trigger in a cgroup. Close it."""

    __slots__ = ("_epoll", "_fd", "trigger")

    def __init__(self, fd: int, trigger: PressureTrigger) -> None:
        """Take over an fd in which the trigger was written."""
        self._fd, self.trigger = fd, trigger
        # An epoll fd is itself readable when a file in it has news: any selector can wait for it.
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLPRI)

    @classmethod
    def open(cls, directory: str, trigger: PressureTrigger) -> Self:
        """Watch a cgroup's v2 directory, "" if it has none.

        Raises OSError: EOPNOTSUPP if this host can't tell, EINVAL for a trigger that it does not take.
        """
        path = f"{directory}/{trigger.resource}.pressure"
        trigger.check(path)
        if not directory:
            raise steps.unsupported(path, "pressure is measured in cgroup v2 alone, which this host has not mounted")
        with contextlib.ExitStack() as undo:
            try:
                fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                undo.callback(os.close, fd)
                os.write(fd, trigger.line().encode())
            except OSError as e:
                raise _refused(e, path, trigger) from e
            watch = cls(fd, trigger)
            undo.pop_all()  # the watch has it now
        return watch

    def fileno(self) -> int:
        """A file descriptor that is readable once after each time that the trigger is reached. Ask is_gone() then."""
        return self._epoll.fileno()

    def is_gone(self) -> bool:
        """Whether fileno() is readable for no other reason than that the cgroup was removed, and will be for ever."""
        return any(events & select.EPOLLERR for _, events in self._epoll.poll(0))

    def close(self) -> None:
        """Watch no longer."""
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._fd)


def _refused(error: OSError, path: str, trigger: PressureTrigger) -> OSError:
    match error.errno:
        case errno.ENOENT if os.path.exists(os.path.dirname(path)):  # noqa: PTH110, PTH120 - a string
            return steps.unsupported(path, "this kernel does not measure pressure (PSI)")
        case errno.EOPNOTSUPP:
            return steps.unsupported(path, "pressure (PSI) is turned off in this kernel: boot it with psi=1")
        case errno.EINVAL:
            why = "without CAP_SYS_RESOURCE its window must be 2 s, or a multiple"
            return steps.invalid(path, f"the kernel does not take the trigger {trigger.line()!r}: {why}")
    return OSError(error.errno, f"cannot write {trigger.line()!r}: {error.strerror}", path)
