"""Hiding and write-protecting parts of /proc and /sys, as steps.

What lies below /proc and /sys is reached from the root of the procfs and sysfs that were just mounted, by fd and
without links, so it is what it is called (CVE-2019-19921, CVE-2025-31133). Elsewhere the image has a say: there a path
is opened once, held inside the root, covered by that fd, and then opened again: what answers must be the cover.
"""

import contextlib
import os
import stat
from dataclasses import dataclass

from corral.kernel import mount, paths
from corral.kernel.mount import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
)
from corral.kernel.syscalls import AT_FDCWD
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.stage import Stage, Step, normal

_NULL = os.makedev(1, 3)
_LINKS_IN_PROC = frozenset(("self", "thread-self", "net", "mounts"))
"""To cover one would hide only one of its names, so that is refused."""


@dataclass(frozen=True, slots=True)
class MaskedPaths(Step):
    """Cover directories with an empty read-only tmpfs (one for all), files with /dev/null; skip what is absent."""

    masked: tuple[str, ...]

    def describe(self) -> str:
        return f"masked: {' '.join(self.masked)}"

    def prepare(self, stage: Stage) -> None:
        if not stage.hold(self, "/dev/null"):
            stage.trees[id(self)] = mount.clone_tree(AT_FDCWD, "/dev/null")

    def apply(self, stage: Stage) -> None:
        covers = _Covers(stage, self)
        for path in self.masked:
            if (place := _kernel_entry(stage, path)) is not None:
                _cover_by_name(covers, *place, path)
                continue
            if (opened := _open(stage, path)) is None:
                continue
            found, sure = opened
            cover = covers.directory() if stat.S_ISDIR(os.fstat(found).st_mode) else covers.file()
            mount.move_mount(cover, found, what="mask", where=path)
            if not sure:
                _check_covered(stage, path, cover)


def _kernel_entry(stage: Stage, path: str) -> tuple[int, str] | None:
    """What lies directly in our own procfs or sysfs: that directory, and the name there. None for everything else."""
    directory, name = os.path.split(normal(path))
    base = {"/proc": stage.proc, "/sys": stage.sys}.get(directory)
    return None if base is None or name in _LINKS_IN_PROC else (base, name)


def _cover_by_name(covers: "_Covers", base: int, name: str, path: str) -> None:
    """Cover an entry, if there is one.

    The directory is the root of a file system of the kernel's that was just mounted, and is held by an fd. Nobody else
    can make or exchange a name in there, so it need not be opened to stay what it is.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(name, dir_fd=base, follow_symlinks=False).st_mode
        cover = covers.directory() if stat.S_ISDIR(mode) else covers.file()
        mount.move_mount(cover, base, name, what="mask", where=path)


class _Covers:
    """Makes the covers: clones of one null device, and of one empty tmpfs.

    Only an attached mount can be cloned (before Linux 6.15). So where there is none yet the first cover is the detached
    mount itself, and the others are clones of that.
    """

    def __init__(self, stage: Stage, step: Step) -> None:
        self._stage = stage
        self._step = step
        self._file: int | None = None
        self._directory: int | None = None

    def directory(self) -> int:
        """A cover for a directory."""
        if self._directory is None:
            ready = self._stage.ready.pop(EMPTY_DIRECTORY, None)
            self._directory = new_empty_directory() if ready is None else ready
            return self._directory
        return mount.clone_tree(self._directory)

    def file(self) -> int:
        """A cover for anything else."""
        if self._file is None:
            self._file = self._null()
            attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY
            mount.set_attributes(self._file, attr_set=attributes, propagation=MS_PRIVATE)
            return self._file
        return mount.clone_tree(self._file)

    def _null(self) -> int:
        """Our own null device, else the host's."""
        own = _own_null(self._stage)
        if own is not None:
            return mount.clone_tree(own)
        copy = self._stage.copy_of(self._step)
        return self._stage.trees[id(self._step)] if copy is None else copy


EMPTY_DIRECTORY = "empty directory"
"""What new_empty_directory() makes, in a larder."""


def new_empty_directory() -> int:
    """A detached tmpfs that holds nothing and never will."""
    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
    return mount.new_mount("tmpfs", "tmpfs", ("size=0", "nr_inodes=1", "mode=755"), attributes=attributes)


def _own_null(stage: Stage) -> int | None:
    """The null device of our own tmpfs on /dev, if it is one."""
    if stage.dev is None:
        return None
    try:
        fd = os.open("null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stage.dev)
    except OSError:
        return None
    return fd if is_null(fd) else None


def is_null(fd: int) -> bool:
    """Whether an fd refers to the null device."""
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL


@dataclass(frozen=True, slots=True)
class ReadonlyPaths(Step):
    """Bind each path over itself read-only, with all that is mounted below it; what is absent is skipped."""

    readonly: tuple[str, ...]

    def describe(self) -> str:
        return f"read-only: {' '.join(self.readonly)}"

    def apply(self, stage: Stage) -> None:
        for path in self.readonly:
            if (opened := _open(stage, path)) is None:
                continue
            found, sure = opened
            tree = mount.clone_tree(found, recursive=True)
            mount.set_attributes(tree, attr_set=MOUNT_ATTR_RDONLY, recursive=True, where=path)
            mount.move_mount(tree, found, what=path, where=path)
            if not sure:
                _check_readonly(stage, path)


def _open(stage: Stage, path: str) -> tuple[int, bool] | None:
    """An fd of path, and whether it is surely what the path says. None if there is no such thing."""
    name = normal(path)
    try:
        for prefix, base in (("/proc/", stage.proc), ("/sys/", stage.sys)):
            if base is not None and name.startswith(prefix):
                resolve = paths.RESOLVE_BENEATH | paths.RESOLVE_NO_SYMLINKS
                return paths.openat2(base, name.removeprefix(prefix), os.O_PATH, resolve=resolve), True
        return paths.open_in_root(stage.root, name), False
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_covered(stage: Stage, path: str, cover: int) -> None:
    with paths.opened(paths.open_in_root(stage.root, path)) as fd:
        if not os.path.samestat(os.fstat(fd), os.fstat(cover)):
            raise ExecFailed(SETUP, f"{path} can't be masked: it was exchanged meanwhile")


def _check_readonly(stage: Stage, path: str) -> None:
    with paths.opened(paths.open_in_root(stage.root, path)) as fd:
        if not os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            raise ExecFailed(SETUP, f"{path} can't be made read-only: it was exchanged meanwhile")
