"""tmpcopyup and copyup: a tmpfs, or an empty directory of the host, that begins with what the image has in its place.

The image is hostile: nothing is opened through a link, and nothing but directories, plain files, links and FIFOs is
copied. What it costs is charged to the container, in whose cgroup this runs.
"""

import contextlib
import errno
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


def copy_directory(source: int, target: int) -> None:
    """Copy what is in the directory source, an fd of any kind, into target, an empty one, and dress that as it is.

    Modes, owners, times and extended attributes are kept, and what is one file by several names.
    """
    _Copy(target).directory(source, target, ())


class _Copy:
    """One of a whole tree."""

    def __init__(self, root: int) -> None:
        self._root = root
        # Where the first copy is of what has several names.
        self._links: dict[tuple[int, int], tuple[str, ...]] = {}

    def directory(self, source: int, target: int, place: tuple[str, ...]) -> None:
        """place: where the target is below the root."""
        if len(place) > _DEEPEST:
            raise ExecFailed(SETUP, f"copying up: the image has more than {_DEEPEST} directories inside one another")
        with (
            paths.opened(paths.openat2(source, ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)) as readable,
            paths.opened(paths.openat2(target, ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)) as written,
        ):
            for name in _entries(readable):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    self._entry(readable, written, (*place, name))
            _dress(written, readable)

    def _entry(self, source: int, target: int, place: tuple[str, ...]) -> None:
        name = place[-1]
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            self._subdirectory(source, target, place)
            return
        inode = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and inode in self._links:
            self._link(self._links[inode], target, name)
        elif _copy(source, target, name, status) and status.st_nlink > 1:
            self._links[inode] = place

    def _subdirectory(self, source: int, target: int, place: tuple[str, ...]) -> None:
        name = place[-1]
        try:
            directory = paths.openat2(source, name, os.O_PATH | os.O_DIRECTORY, resolve=_BENEATH)
        except OSError:  # EXDEV: something is mounted there
            return
        with paths.opened(directory):
            os.mkdir(name, 0o700, dir_fd=target)
            with paths.opened(paths.openat2(target, name, os.O_PATH | os.O_DIRECTORY, resolve=_BENEATH)) as copy:
                self.directory(directory, copy, place)

    def _link(self, first: tuple[str, ...], target: int, name: str) -> None:
        above = "/".join((".", *first[:-1]))
        with paths.opened(paths.openat2(self._root, above, os.O_PATH | os.O_DIRECTORY, resolve=_BENEATH)) as directory:
            os.link(first[-1], name, src_dir_fd=directory, dst_dir_fd=target, follow_symlinks=False)


def _copy(source: int, target: int, name: str, status: os.stat_result) -> bool:
    """Whether it is one of the kinds that are copied."""
    match stat.S_IFMT(status.st_mode):
        case stat.S_IFREG:
            return _copy_file(source, target, name)
        case stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        case stat.S_IFIFO:
            os.mkfifo(name, stat.S_IMODE(status.st_mode), dir_fd=target)
        case _:
            return False
    os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)
    return True


def _copy_file(source: int, target: int, name: str) -> bool:
    try:
        # O_NONBLOCK: by now it may be a FIFO.
        opened = paths.openat2(source, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=_BENEATH)
    except OSError:
        return False
    with paths.opened(opened) as original:
        if not stat.S_ISREG(os.fstat(original).st_mode):
            return False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with paths.opened(os.open(name, flags, 0o600, dir_fd=target)) as copy:
            while os.sendfile(copy, original, None, _CHUNK):
                pass
            _dress(copy, original)
    return True


def _dress(fd: int, original: int) -> None:
    """Attributes last but for times: a change of owner takes capabilities away."""
    status = os.fstat(original)
    os.fchown(fd, status.st_uid, status.st_gid)
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
    for name in _attributes(original):
        try:
            os.setxattr(fd, name, os.getxattr(original, name))
        except OSError as e:  # the file system has none of the kind, or it is not for us to set
            if e.errno not in (errno.ENOTSUP, errno.EPERM, errno.ENODATA):
                raise
    os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError as e:
        if e.errno == errno.ENOTSUP:
            return []
        raise
