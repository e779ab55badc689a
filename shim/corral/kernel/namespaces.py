"""Namespaces: their kinds, joining and naming them. (`corral.kernel.netns` makes and pins network namespaces.)"""

import os
from collections.abc import Iterable
from enum import Enum

from corral.kernel.syscalls import Path, failure


class Kind(Enum):
    """A kind of namespace; the value is its name in config.json."""

    MOUNT = "mount"
    PID = "pid"
    NETWORK = "network"
    IPC = "ipc"
    UTS = "uts"
    USER = "user"
    CGROUP = "cgroup"
    TIME = "time"

    @property
    def flag(self) -> int:
        """Its CLONE_NEW* bit."""
        return _FLAGS[self]

    @property
    def file(self) -> str:
        """Its name under /proc/<pid>/ns."""
        return _FILES.get(self, self.value)


_FLAGS = {
    Kind.MOUNT: 0x00020000,
    Kind.PID: 0x20000000,
    Kind.NETWORK: 0x40000000,
    Kind.IPC: 0x08000000,
    Kind.UTS: 0x04000000,
    Kind.USER: 0x10000000,
    Kind.CGROUP: 0x02000000,
    Kind.TIME: 0x00000080,
}
_FILES = {Kind.MOUNT: "mnt", Kind.NETWORK: "net"}


def flags_of(kinds: Iterable[Kind]) -> int:
    """The kinds as one CLONE_NEW* mask."""
    mask = 0
    for kind in kinds:
        mask |= _FLAGS[kind]
    return mask


def open_namespace(path: Path) -> int:
    """An fd of a namespace file (/proc/<pid>/ns/*, or one pinned by a bind mount)."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def join(fd: int, flags: int, *, what: Path = "") -> None:
    """setns(2): enter the namespace of a namespace fd, or those in flags of the process of a pidfd."""
    try:
        os.setns(fd, flags)
    except OSError as e:
        raise failure(e.errno or 0, "setns", what or f"fd {fd}") from e


def leave(flags: int) -> None:
    """unshare(2): leave the namespaces in flags for new ones; of a new time namespace only children are members."""
    try:
        os.unshare(flags)
    except OSError as e:
        raise failure(e.errno or 0, f"unshare {flags:#x}") from e
