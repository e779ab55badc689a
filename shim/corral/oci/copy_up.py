"""tmpcopyup and copyup: a tmpfs, or an empty directory of the host, that begins with what the image has in its place.

The image is hostile: nothing is opened through a link, and nothing but directories, plain files, links and FIFOs is
copied. What it costs is charged to the container, in whose cgroup this runs.
"""

import contextlib
import fcntl
import os
import stat

from corral.kernel import paths
from corral.oci.errors import SETUP, ExecFailed

_BENEATH = paths.RESOLVE_BENEATH | paths.RESOLVE_NO_SYMLINKS | paths.RESOLVE_NO_XDEV
"""What is mounted below is no part of the image."""
_DEEPEST = 100
_CHUNK = 1 << 20


_LOST_AND_FOUND = "lost+found"
"""What a new file system may have in its root."""


def fill(target: int, source: int) -> None:
    """Copy what is in source into target, if that is empty: all of it, or nothing. Who comes meanwhile waits."""
    with paths.opened(paths.openat2(target, ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)) as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        if not _entries(locked):
            try:
                copy_directory(source, target)
            except BaseException:
                _empty(locked)
                raise


def _entries(directory: int) -> list[str]:
    return [name for name in os.listdir(directory) if name != _LOST_AND_FOUND]


def _empty(directory: int) -> None:
    """Remove what is in a directory, following nothing."""
    for name in _entries(directory):
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            with paths.opened(paths.openat2(directory, name, os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)) as below:
                _empty(below)
            os.rmdir(name, dir_fd=directory)


def copy_directory(source: int, target: int, depth: int = 0) -> None:
    """Copy what is in the directory source, an fd of any kind, into target, an empty one; and its mode and owner."""
    if depth > _DEEPEST:
        raise ExecFailed(SETUP, f"copying up: the image has more than {_DEEPEST} directories inside one another")
    with (
        paths.opened(paths.openat2(source, ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)) as readable,
        paths.opened(paths.openat2(target, ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)) as written,
    ):
        for name in _entries(readable):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                _copy(readable, written, name, depth)
        _dress(written, os.fstat(readable))


def _copy(source: int, target: int, name: str, depth: int) -> None:
    status = os.stat(name, dir_fd=source, follow_symlinks=False)
    match stat.S_IFMT(status.st_mode):
        case stat.S_IFDIR:
            try:
                directory = paths.openat2(source, name, os.O_PATH | os.O_DIRECTORY, resolve=_BENEATH)
            except OSError:  # EXDEV: something is mounted there
                return
            os.mkdir(name, 0o700, dir_fd=target)
            with (
                paths.opened(directory),
                paths.opened(paths.openat2(target, name, os.O_PATH | os.O_DIRECTORY, resolve=_BENEATH)) as copy,
            ):
                copy_directory(directory, copy, depth + 1)
        case stat.S_IFREG:
            _copy_file(source, target, name)
        case stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        case stat.S_IFIFO:
            os.mkfifo(name, stat.S_IMODE(status.st_mode), dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)


def _copy_file(source: int, target: int, name: str) -> None:
    try:
        # O_NONBLOCK: by now it may be a FIFO.
        opened = paths.openat2(source, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=_BENEATH)
    except OSError:
        return
    with paths.opened(opened) as original:
        status = os.fstat(original)
        if not stat.S_ISREG(status.st_mode):
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with paths.opened(os.open(name, flags, 0o600, dir_fd=target)) as copy:
            while os.sendfile(copy, original, None, _CHUNK):
                pass
            _dress(copy, status)


def _dress(fd: int, status: os.stat_result) -> None:
    os.fchown(fd, status.st_uid, status.st_gid)
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
    os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
