"""Paths inside a root file system that somebody else wrote.

Everything below a container's root is hostile: a name may be a link that leads to the host, and may be exchanged for
another one at any moment. So a path is resolved by the kernel, held inside the root (openat2 RESOLVE_IN_ROOT), and from
then on only the file descriptor is used.
"""

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator

from corral.kernel.syscalls import check, failure, syscall

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_MAX_LINKS = 40

_HOW = struct.Struct("=3Q")
"""struct open_how: flags, mode, resolve."""
_openat2 = syscall("openat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)


def openat2(dirfd: int, path: str, flags: int, *, resolve: int, mode: int = 0) -> int:
    """openat2(2), always close-on-exec. EAGAIN (a rename raced with the resolution) is tried again, boundedly."""
    how = _HOW.pack(flags | os.O_CLOEXEC, mode, resolve)
    name = os.fsencode(path)
    for _ in range(64):
        fd = _openat2(dirfd, name, how, _HOW.size)
        if fd >= 0 or ctypes.get_errno() != errno.EAGAIN:
            break
    return check(fd, "openat2", path)


def open_in_root(root: int, path: str, flags: int = os.O_PATH, *, resolve: int = 0) -> int:
    """Open path as a process chrooted to root would see it; magic links (/proc/*/fd, /proc/*/root) are refused."""
    return openat2(root, path, flags, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve)


@contextlib.contextmanager
def opened(fd: int) -> Iterator[int]:
    """Own an fd for the length of a block."""
    try:
        yield fd
    finally:
        os.close(fd)


def make_directory_in_root(root: int, path: str, mode: int = 0o755) -> int:
    """An O_PATH fd of the directory at path inside root; what is missing of it is created, root-owned, with mode.

    Dangling links are followed inside the root, as runc does (/var/run -> /run where the image lacks /run).
    """
    with contextlib.suppress(FileNotFoundError):
        return open_in_root(root, path, os.O_PATH | os.O_DIRECTORY)
    fd = _create(root, path, mode, directory=True)
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise failure(errno.ENOTDIR, "openat2", path)
    return fd


def make_file_in_root(root: int, path: str, mode: int = 0o644) -> int:
    """An O_PATH fd of the non-directory at path inside root; created as an empty file where nothing is."""
    try:
        fd = open_in_root(root, path)
    except FileNotFoundError:
        fd = _create(root, path, mode, directory=False)
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind in (stat.S_IFDIR, stat.S_IFLNK):  # a link: put there between making the file and opening it
        os.close(fd)
        raise failure(errno.EISDIR if kind == stat.S_IFDIR else errno.ELOOP, "openat2", path)
    return fd


def _create(root: int, path: str, mode: int, *, directory: bool) -> int:
    """Make what is missing: most often it is the last name only."""
    parent, _, name = path.rstrip("/").rpartition("/")
    if name not in ("", ".", ".."):
        with (
            contextlib.suppress(FileNotFoundError),
            opened(open_in_root(root, parent or "/", os.O_PATH | os.O_DIRECTORY)) as at,
        ):
            made = _make(at, name, mode, directory=directory)
            if isinstance(made, int):
                return made
    for _ in range(_MAX_LINKS):
        link = _create_walking(root, path, mode, directory=directory)
        if isinstance(link, int):
            return link
        path = link
    raise failure(errno.ELOOP, "openat2", path)


def _create_walking(root: int, path: str, mode: int, *, directory: bool) -> int | str:
    """Walk from root, making what is missing. Met a dangling link: the path to go on with instead."""
    names = [name for name in path.split("/") if name not in ("", ".")]
    at = os.dup(root)
    try:
        for i, name in enumerate(names):
            last = i == len(names) - 1
            try:
                # By the whole prefix, so that a link (or ..) met on the way is held inside the root.
                found = open_in_root(root, "/".join(names[: i + 1]))
            except FileNotFoundError:
                made = _make(at, name, 0o755 if not last else mode, directory=directory or not last)
                if isinstance(made, str):
                    base = [] if made.startswith("/") else names[:i]
                    return "/".join([*base, made, *names[i + 1 :]])
                found = made
            os.close(at)
            at = found
        return os.dup(at)
    finally:
        os.close(at)


def _make(parent: int, name: str, mode: int, *, directory: bool) -> int | str:
    """Make name in parent and open it; a link found there instead is returned as its target."""
    try:
        if directory:
            os.mkdir(name, mode, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=parent))
    except FileExistsError:
        with contextlib.suppress(OSError):
            return os.readlink(name, dir_fd=parent)
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
