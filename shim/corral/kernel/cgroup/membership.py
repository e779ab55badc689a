"""Moving processes into a cgroup and listing the ones in it.

A write to `cgroup.procs` makes the kernel stop every fork and exit of the host until an RCU grace period has
passed: 7 to 15 ms, measured. Two ways do without that lock, and together they cover every hierarchy:

    v1   the (single-threaded) process itself writes "0" to `tasks`: about 20 us a hierarchy
    v2   the process is born there, by clone3(CLONE_INTO_CGROUP): no cost

So a launcher splits its paths with birthplace(), gives the v2 one to clone3, and the child calls join().

Source: kernel/cgroup/cgroup.c cgroup_procs_write_start(); clone(2) CLONE_INTO_CGROUP.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from corral.kernel.cgroup import files

if TYPE_CHECKING:
    from pathlib import Path

PROCS = "cgroup.procs"
TASKS = "tasks"  # v1 alone has it
SELF = 0
_V2_LINE = b"0::"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def birthplace(paths: "Iterable[Path]") -> "tuple[Path | None, list[Path]]":
    """Split a cgroup's directories: the v2 one, for CLONE_INTO_CGROUP, and those to join() from inside."""
    v2: Path | None = None
    rest = []
    for path in paths:
        if v2 is None and not (path / TASKS).exists():
            v2 = path
        else:
            rest.append(path)
    return v2, rest


def join(paths: "Iterable[Path]", pid: int = SELF) -> None:
    """Move a process into the given directories, one per hierarchy.

    pid SELF (0) is the caller, who must have a single thread; it is quick but for a v2 directory that the
    caller was not born in. Any other pid moves with all its threads.
    Raises OSError naming the file: ESRCH if the process is gone, EBUSY or ENOSPC if the cgroup takes none.
    """
    for path in paths:
        _join(str(path), pid)


def _join(directory: str, pid: int) -> None:
    if pid != SELF:
        files.write(f"{directory}/{PROCS}", str(pid))
        return
    try:
        files.write(f"{directory}/{TASKS}", "0")
    except FileNotFoundError:
        if os.getpid() not in pids(directory):
            files.write(f"{directory}/{PROCS}", "0")


def pids(directory: str) -> list[int]:
    """The processes right in one cgroup directory, sub-cgroups left out; [] if it is gone.

    One that is for threads tells none: their processes are in the nearest one above that is not.
    """
    try:
        return sorted({int(pid) for pid in files.read(f"{directory}/{PROCS}").split()})
    except OSError as e:
        if not gone(e) and e.errno != errno.EOPNOTSUPP:
            raise
        return []


def pids_below(directory: str) -> list[int]:
    """The processes in a cgroup directory and all its sub-cgroups."""
    found: set[int] = set()
    for each in subtree(directory):
        found.update(pids(each))
    return sorted(found)


def path_in_v2(pid: int) -> str:
    """The path of a process's v2 cgroup below the root of the caller's cgroup namespace; "" where there is no v2.

    Raises OSError(ENOENT or ESRCH) if there is no such process. Source: cgroups(7) "/proc files".
    """
    for line in files.read_bytes(f"/proc/{pid}/cgroup").splitlines():
        if line.startswith(_V2_LINE):
            return os.fsdecode(line.removeprefix(_V2_LINE))
    return ""


def subtree(directory: str) -> Iterator[str]:
    """A cgroup directory and everything below it, parents before children; nothing if it is gone or "".

    Each is a path that is good until the next one is asked for: what is below has one by its descriptor.
    """
    try:
        is_leaf = _is_leaf(directory)
    except OSError as e:
        if not gone(e):
            raise
        return
    yield directory
    if not is_leaf:
        for fd in below(directory):
            yield f"/proc/self/fd/{fd}"


def has_any_below(directory: str) -> bool:
    """Whether a cgroup directory has sub-cgroups; False if it is gone."""
    try:
        return not _is_leaf(directory)
    except OSError as e:
        if not gone(e):
            raise
        return False


def _is_leaf(directory: str) -> bool:
    """The kernel counts sub-cgroups in st_nlink, which saves opening and listing a leaf."""
    return os.stat(directory).st_nlink <= 2  # noqa: PTH116 - a string


def below(directory: str, leave: Callable[[int, str], object] = lambda _parent, _name: None) -> Iterator[int]:
    """An fd of each directory below one, parents before children, good until the next is asked for.

    leave is called with the parent's fd and the name of each once all below that was seen. A container may make its
    tree deeper than a path may be long, calls may be nested or descriptors be had: one is held at a time.
    """
    fd = _open(directory, None)
    if fd is None:
        return
    way: list[str] = []
    left = [_children(fd)]
    try:
        while left[-1] or way:
            if left[-1]:
                name = left[-1].pop()
                if (child := _open(name, fd)) is None:
                    continue
                fd = _instead(fd, child)
                way.append(name)
                yield fd
                left.append(_children(fd))
            else:
                left.pop()
                fd = _instead(fd, os.open("..", _DIRECTORY, dir_fd=fd))
                leave(fd, way.pop())
    finally:
        os.close(fd)


def _instead(fd: int, other: int) -> int:
    os.close(fd)
    return other


def _open(path: str, at: int | None) -> int | None:
    try:
        return os.open(path, _DIRECTORY, dir_fd=at)
    except OSError as e:
        if not gone(e):
            raise
        return None


def _children(fd: int) -> list[str]:
    try:
        if os.fstat(fd).st_nlink <= 2:
            return []
        with os.scandir(fd) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as e:
        if not gone(e):
            raise
        return []


def gone(error: OSError) -> bool:
    """Whether an error only says that the cgroup was removed: ENOENT on open, ENODEV on a file held open."""
    return error.errno in (errno.ENOENT, errno.ENODEV)
