"""Laying an unpacked layer on a tree: afterwards the tree is what overlayfs would show of both.

    whiteout           what the tree has of that name goes
    opaque directory   what the tree has in it goes first
    directory          is made, or takes the attributes of the layer's
    anything else      replaces what the tree has of that name

With `verbatim` the marks of overlayfs mean nothing, and are copied like everything else: a copy of an upper directory.

Nobody else may change either of the two meanwhile. However deep they are, two descriptors are enough: the way back up
is "..". What is a file with several names in the layer is one in the tree.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.images.layers.apply import OPAQUE_XATTR
from corral.images.layers.hiding import is_whiteout
from corral.images.layers.removal import remove_below
from corral.kernel.copying import clone_file, copy_file

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MARKS = "trusted.overlay."
_LABEL = "security.selinux"  # the host's policy gives one to whatever is made
# open(2) takes paths of 4,095 bytes: longer ones are walked in pieces of at most so many names of 255 bytes.
_PIECE = 15


def lay(layers: Sequence[Path], target: Path, *, verbatim: bool = False) -> None:
    """Lay layers, the lowest first, on the tree at `target`. Needs umask 0. Raises OSError."""
    for layer in layers:
        source = os.open(layer, _DIRECTORY)
        try:
            root = os.open(target, _DIRECTORY)
            try:
                _Laying(source, root, verbatim=verbatim).run()
            finally:
                os.close(root)
        finally:
            os.close(source)


class _Laying:
    """One layer on its way. `_source` and `_target` are the directories that are being worked on."""

    def __init__(self, source: int, target: int, *, verbatim: bool) -> None:
        self._root = target
        self._source, self._target = os.dup(source), os.dup(target)
        self._verbatim = verbatim
        self._clones = True  # until the file system says that it cannot
        self._path: list[str] = []
        # Where the first name of a file is that has more than one, by its number in the layer.
        self._links: dict[tuple[int, int], tuple[str, ...]] = {}

    def run(self) -> None:
        pending: list[Iterator[str]] = [self._names()]
        try:
            while pending:
                name = next(pending[-1], None)
                if name is None:
                    pending.pop()
                    self._leave()
                elif self._lay(name):
                    pending.append(self._names())
        finally:
            os.close(self._source)
            os.close(self._target)

    def _names(self) -> Iterator[str]:
        return iter(os.listdir(self._source))  # noqa: PTH208 - a descriptor

    def _lay(self, name: str) -> bool:
        """Lay one entry; True if it is a directory, in which the work goes on."""
        status = os.stat(name, dir_fd=self._source, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            self._enter(name)
            return True
        self._remove(name)
        if self._verbatim or not is_whiteout(status):
            self._copy(name, status)
        return False

    def _enter(self, name: str) -> None:
        source = os.open(name, _DIRECTORY, dir_fd=self._source)
        try:
            target = self._directory(name, source)
        except BaseException:
            os.close(source)
            raise
        os.close(self._source)
        os.close(self._target)
        self._source, self._target = source, target
        self._path.append(name)

    def _directory(self, name: str, source: int) -> int:
        """The directory of the tree that the layer's, `source`, goes on; without what that hides."""
        try:
            os.mkdir(name, 0o700, dir_fd=self._target)
        except FileExistsError:
            is_directory = stat.S_ISDIR(os.stat(name, dir_fd=self._target, follow_symlinks=False).st_mode)
            if not is_directory or (not self._verbatim and _is_opaque(source)):
                self._remove(name)
                os.mkdir(name, 0o700, dir_fd=self._target)
        return os.open(name, _DIRECTORY, dir_fd=self._target)

    def _leave(self) -> None:
        """Only now: what happens in a directory changes its time."""
        self._attributes(self._source, self._target, os.fstat(self._source))
        if not self._path:
            return
        self._path.pop()
        above = os.open("..", _DIRECTORY, dir_fd=self._source)
        os.close(self._source)
        self._source = above
        above = os.open("..", _DIRECTORY, dir_fd=self._target)
        os.close(self._target)
        self._target = above

    def _remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._target)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            remove_below(name, self._target)

    # What is not a directory

    def _copy(self, name: str, status: os.stat_result) -> None:
        if status.st_nlink > 1:
            key = (status.st_dev, status.st_ino)
            if (first := self._links.setdefault(key, (*self._path, name))) != (*self._path, name):
                self._link(first, name)
                return
        if stat.S_ISREG(status.st_mode):
            self._copy_file(name, status)
        else:
            self._copy_other(name, status)

    def _link(self, first: tuple[str, ...], name: str) -> None:
        above = open_deep(self._root, first[:-1])
        try:
            os.link(first[-1], name, src_dir_fd=above, dst_dir_fd=self._target, follow_symlinks=False)
        finally:
            os.close(above)

    def _copy_file(self, name: str, status: os.stat_result) -> None:
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._source)
        try:
            target = os.open(name, _NEW_FILE, 0o600, dir_fd=self._target)
            try:
                if status.st_size:
                    self._clones = self._clones and clone_file(source, target)
                    if not self._clones:
                        copy_file(source, target, status.st_size)
                self._attributes(source, target, status)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _copy_other(self, name: str, status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=self._source), name, dir_fd=self._target)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=self._target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=self._target, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=self._target)  # made just now: no link to follow
        old, new = f"/proc/self/fd/{self._source}/{name}", f"/proc/self/fd/{self._target}/{name}"
        for attribute in filter(self._is_kept, os.listxattr(old, follow_symlinks=False)):
            os.setxattr(new, attribute, os.getxattr(old, attribute, follow_symlinks=False), follow_symlinks=False)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=self._target, follow_symlinks=False)

    def _attributes(self, source: int, target: int, status: os.stat_result) -> None:
        """Of a file or directory; in this order, since each call may undo some of what a later one does."""
        os.fchown(target, status.st_uid, status.st_gid)
        os.fchmod(target, stat.S_IMODE(status.st_mode))
        wanted = {name: os.getxattr(source, name) for name in os.listxattr(source) if self._is_kept(name)}
        for name in os.listxattr(target):
            if name not in wanted and name != _LABEL:
                os.removexattr(target, name)
        for name, value in wanted.items():
            os.setxattr(target, name, value)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _is_kept(self, attribute: str) -> bool:
        return attribute != _LABEL and (self._verbatim or not attribute.startswith(_MARKS))


def _is_opaque(directory: int) -> bool:
    try:
        return os.getxattr(directory, OPAQUE_XATTR) == b"y"
    except OSError as e:
        if e.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise


def open_deep(root: int, parts: Sequence[str]) -> int:
    """A directory of the tree, whose path may be longer than open(2) takes one."""
    fd = os.dup(root)
    for start in range(0, len(parts), _PIECE):
        below = os.open("/".join(parts[start : start + _PIECE]), _DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd
