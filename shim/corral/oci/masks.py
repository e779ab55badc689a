"""Hiding and write-protecting parts of /proc and /sys, as steps.

What lies below /proc and /sys is reached from the root of the procfs and sysfs that were just mounted, by fd and
without links, so it is what it is called (CVE-2019-19921, CVE-2025-31133). Elsewhere the image has a say: there a path
is opened once, held inside the root, covered by that fd, and then opened again: what answers must be the cover.
"""

import os
import stat
from dataclasses import dataclass

from corral.kernel import mount, paths
from corral.kernel.mount import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY
from corral.kernel.syscalls import AT_FDCWD
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.stage import Stage, Step, normal

_NULL = os.makedev(1, 3)


@dataclass(frozen=True, slots=True)
class MaskedPaths(Step):
    """Cover directories with an empty read-only tmpfs (one for all), files with /dev/null; skip what is absent."""

    masked: tuple[str, ...]

    def describe(self) -> str:
        return f"masked: {' '.join(self.masked)}"

    def prepare(self, stage: Stage) -> None:
        stage.trees[id(self)] = mount.clone_tree(AT_FDCWD, "/dev/null")

    def apply(self, stage: Stage) -> None:
        covers = _Covers(stage, fallback_null=stage.trees.pop(id(self)))
        for path in self.masked:
            if (opened := _open(stage, path)) is None:
                continue
            found, sure = opened
            cover = covers.for_target(found)
            mount.move_mount(cover, found, what="mask", where=path)
            os.close(found)
            if not sure:
                _check_covered(stage, path, cover)


class _Covers:
    """Makes the covers: clones of one empty tmpfs, and of one null device."""

    def __init__(self, stage: Stage, fallback_null: int) -> None:
        self._null = _own_null(stage) or fallback_null
        self._directory: int | None = None

    def for_target(self, target: int) -> int:
        if not stat.S_ISDIR(os.fstat(target).st_mode):
            cover = mount.clone_tree(self._null)
            mount.set_attributes(cover, attr_set=MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY)
            return cover
        if self._directory is None:
            # The first one is attached itself: only an attached mount can be cloned (before Linux 6.15).
            attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
            options = ("size=0", "nr_inodes=1", "mode=755")
            self._directory = mount.new_mount("tmpfs", "tmpfs", options, attributes=attributes)
            return self._directory
        return mount.clone_tree(self._directory)


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
            with paths.opened(found), paths.opened(mount.clone_tree(found, recursive=True)) as tree:
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
