"""Putting a new process into its cgroups without waiting.

Moving another process writes its pid to cgroup.procs, for which the kernel waits out an RCU grace period, for
milliseconds. Two ways need no wait: in v2 a process can be born inside (CLONE_INTO_CGROUP), and in v1 a thread may move
itself by writing 0 to `tasks`.

A v2 cgroup takes no process once it gives controllers to those below it ("no internal processes"), which a container
may have done with its own: then its processes are below, and who joins it goes where its init is.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from corral.kernel import process
from corral.kernel.cgroup import detect, path_in_v2
from corral.kernel.syscalls import failure
from corral.oci.errors import SETUP, ExecFailed

TAKES_NONE = frozenset((errno.EBUSY, errno.EOPNOTSUPP))
"""Why no process can be born in a v2 cgroup: it has given controllers away, or is made for threads."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Where a process is to be: at most one v2 cgroup, and one per v1 hierarchy."""

    unified: int | None
    """fd of the v2 cgroup's directory."""
    tasks: tuple[tuple[int, str], ...]
    """fd and path of the `tasks` files of v1, which a child inherits to move itself by, out of sight of the host."""

    @classmethod
    def open(cls, cgroups: Sequence[str]) -> "Membership":
        """Sort cgroup directories by version; the caller closes them with close().

        Raises ExecFailed for a frozen one, in which a process would stop in the middle of its set-up.
        """
        unified: int | None = None
        tasks: list[tuple[int, str]] = []
        try:
            for cgroup in cgroups:
                path = f"{cgroup}/tasks"
                if (fd := _open(path, os.O_WRONLY)) is not None:
                    tasks.append((fd, path))
                elif unified is None:  # v2 has no such file
                    unified = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    _check_thawed(f"{cgroup}/cgroup.events", b"frozen 1")
                else:
                    raise failure(errno.EINVAL, "join a second cgroup of v2", cgroup)
            # A v1 hierarchy is called after its controllers: where one is called after the freezer no other has it.
            v1 = [path.removesuffix("tasks") for _, path in tasks]
            for directory in [path for path in v1 if "freezer" in path] or v1:
                _check_thawed(f"{directory}freezer.state", b"FR")
        except BaseException:
            cls(unified, tuple(tasks)).close()
            raise
        return cls(unified, tuple(tasks))

    @classmethod
    def beside(cls, init: int, pidfd: int, cgroups: Sequence[str]) -> "Membership | None":
        """The same, but for the v2 cgroup: that of the process init, if it is below; None if it is not.

        Raises ProcessLookupError if init, of which pidfd is one, was reaped; else as open() does.
        """
        if (unified := detect().unified) is None:
            return None
        found = f"{unified.mount_point}{path_in_v2(init)}"
        process.check_unreaped(pidfd)
        if "/../" in found:  # outside of what the caller sees
            return None
        within = [found if found.startswith(f"{cgroup}/") else cgroup for cgroup in cgroups]
        return cls.open(within) if found in within else None

    @property
    def fds(self) -> list[int]:
        """All that is open, for the list of fds to keep."""
        return [*([] if self.unified is None else [self.unified]), *(fd for fd, _ in self.tasks)]

    def join_v1(self) -> None:
        """Move the calling, single-threaded process."""
        for fd, path in self.tasks:
            try:
                os.write(fd, b"0")
            except OSError as e:
                raise failure(e.errno or 0, "join cgroup", path) from e

    def close(self) -> None:
        """Close what open() opened."""
        for fd in self.fds:
            os.close(fd)


def _open(path: str, flags: int) -> int | None:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _check_thawed(path: str, frozen: bytes) -> None:
    """Raise ExecFailed if a file, where there is one, says that its cgroup is frozen."""
    if (fd := _open(path, os.O_RDONLY)) is None:
        return
    try:
        if frozen in os.read(fd, 256):
            raise ExecFailed(SETUP, "the container is paused")
    finally:
        os.close(fd)
