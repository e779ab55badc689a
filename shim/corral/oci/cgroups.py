"""Putting a new process into its cgroups without waiting.

Moving another process writes its pid to cgroup.procs, for which the kernel waits out an RCU grace period, for
milliseconds. Two ways need no wait: in v2 a process can be born inside (CLONE_INTO_CGROUP), and in v1 a thread may move
itself by writing 0 to `tasks`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from corral.kernel.syscalls import CGROUP2_SUPER_MAGIC, failure, filesystem_magic
from corral.oci.errors import SETUP, ExecFailed


@dataclass(frozen=True, slots=True)
class Membership:
    """Where a process is to be: at most one v2 cgroup, and one per v1 hierarchy."""

    unified: int | None
    """fd of the v2 cgroup's directory."""
    tasks: tuple[str, ...]
    """The `tasks` files of v1."""

    @classmethod
    def open(cls, cgroups: Sequence[str]) -> "Membership":
        """Sort cgroup directories by version; the caller closes them with close().

        Raises ExecFailed for a frozen one, in which a process would stop in the middle of its set-up.
        """
        unified: int | None = None
        tasks: list[str] = []
        for cgroup in cgroups:
            fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _is_frozen(fd):
                os.close(fd)
                raise ExecFailed(SETUP, "the container is paused")
            if filesystem_magic(fd) == CGROUP2_SUPER_MAGIC and unified is None:
                unified = fd
            else:
                os.close(fd)
                tasks.append(f"{cgroup}/tasks")
        return cls(unified, tuple(tasks))

    def join_v1(self) -> None:
        """Move the calling, single-threaded process."""
        self.join_opened(self.open_v1())

    def open_v1(self) -> list[int]:
        """The `tasks` files, for join_opened() where they are out of sight; the caller owns them."""
        return [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in self.tasks]

    def join_opened(self, tasks: Sequence[int]) -> None:
        """Move the calling, single-threaded process, by what open_v1() gave, and close that."""
        for fd, path in zip(tasks, self.tasks, strict=True):
            try:
                os.write(fd, b"0")
            except OSError as e:
                raise failure(e.errno or 0, "join cgroup", path) from e
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close what open() opened."""
        if self.unified is not None:
            os.close(self.unified)


def _is_frozen(directory: int) -> bool:
    """Whether a cgroup that can be frozen (a v1 freezer, or v2) is."""
    for name, frozen in (("cgroup.events", b"frozen 1"), ("freezer.state", b"FR")):
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            continue
        try:
            return frozen in os.read(fd, 256)
        finally:
            os.close(fd)
    return False
