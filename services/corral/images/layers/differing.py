"""What a whole tree, such as drivers keep that copy, has become beside the layers that it was made of.

A file is as it was if its ctime, which nobody can set, is not after the time when the tree was made: but only where
no directory above it has changed either, for what is moved along with its directory keeps it. Everything else is
compared, to its content if need be.

Nobody vouches for the tree: directories are opened from its root, below it and through no link.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from corral.images.layers.below import visible
from corral.images.layers.comparing import Change
from corral.images.layers.hiding import is_whiteout
from corral.images.layers.packing import attributes_of, open_directory

_CHUNK = 1 << 20
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OPAQUE = "trusted.overlay.opaque"


@dataclass(slots=True)
class _Directory:
    """One that waits for its turn. told: it and those above it have been."""

    path: str
    above: "_Directory | None"
    moved: bool
    told: bool


class Differing:
    """The tree at `root`, made at `since_ns` of the layers with the roots `below`, the uppermost first."""

    def __init__(self, root: int, below: Sequence[int], since_ns: int) -> None:
        self._root, self._below, self._since_ns = root, below, since_ns

    def changes(self) -> Iterator[tuple[Change, str]]:
        """Paths in the order in which they are packed: a directory before what is in it, and its files before its
        directories. Of a directory that is gone only itself is told."""
        waiting = [_Directory("", None, moved=False, told=True)]
        while waiting:
            directory = waiting.pop()
            inner: list[_Directory] = []
            for kind, path in self._inside(directory, inner):
                yield from _tell(directory)
                yield kind, path
            waiting += reversed(inner)

    def _inside(self, directory: _Directory, inner: list[_Directory]) -> Iterator[tuple[Change, str]]:
        fd = open_directory(self._root, directory.path)
        if fd is None:
            return
        try:
            if directory.path:
                yield from self._itself(directory, fd)
            before = self._names_below(directory.path)
            names = set(os.listdir(fd))  # noqa: PTH208 - a descriptor
            for name in sorted(names | before, key=os.fsencode):
                path = f"{directory.path}/{name}" if directory.path else name
                if name not in names:
                    yield Change.DELETED, path
                    continue
                with suppress(FileNotFoundError):
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        moved = directory.moved or status.st_ctime_ns > self._since_ns
                        inner.append(_Directory(path, directory, moved=moved, told=False))
                    elif not stat.S_ISSOCK(status.st_mode):
                        change = self._change(path, name, fd, status, maybe_moved=directory.moved)
                        if change is not None:
                            yield change, path
        finally:
            os.close(fd)

    def _itself(self, directory: _Directory, fd: int) -> Iterator[tuple[Change, str]]:
        """Of a directory: told once, before anything in it."""
        with visible(self._below, directory.path) as was:
            status = os.fstat(fd)
            if was is None or not stat.S_ISDIR(os.fstat(was).st_mode):
                directory.told = True
                change = Change.ADDED if was is None else Change.CHANGED
            elif not _is_same(status, os.fstat(was)) or attributes_of(fd) != _attributes(was):
                directory.told = True
                change = Change.CHANGED
            else:
                return
        if directory.above is not None:
            yield from _tell(directory.above)
        yield change, directory.path

    def _change(self, path: str, name: str, parent: int, status: os.stat_result, *, maybe_moved: bool) -> Change | None:
        if status.st_ctime_ns <= self._since_ns and not maybe_moved:
            return None
        with visible(self._below, path) as was:
            if was is None:
                return Change.ADDED
            before = os.fstat(was)
            if not _is_same(status, before) or not self._holds_the_same(name, parent, status, was):
                return Change.CHANGED
        return None

    def _holds_the_same(self, name: str, parent: int, status: os.stat_result, was: int) -> bool:
        if stat.S_ISLNK(status.st_mode):
            return os.readlink(name, dir_fd=parent) == os.readlink("", dir_fd=was)
        if not stat.S_ISREG(status.st_mode):
            return True
        try:
            now = os.open(name, _FILE, dir_fd=parent)
        except OSError:  # it has become something else meanwhile
            return False
        try:
            return attributes_of(now) == _attributes(was) and _content_is_same(now, was)
        finally:
            os.close(now)

    def _names_below(self, path: str) -> set[str]:
        """What the layers show in a directory."""
        shown: set[str] = set()
        hidden: set[str] = set()
        for root in self._below:
            fd = open_directory(root, path)
            if fd is None:
                if _is_covered(root, path):
                    break
                continue
            try:
                for name in os.listdir(fd):  # noqa: PTH208 - a descriptor
                    if name in shown or name in hidden:
                        continue
                    is_hidden = is_whiteout(os.stat(name, dir_fd=fd, follow_symlinks=False))
                    (hidden if is_hidden else shown).add(name)
                if path and _is_opaque(fd):
                    break
            finally:
                os.close(fd)
        return shown


def _tell(directory: _Directory) -> Iterator[tuple[Change, str]]:
    """Those above something that has changed, the root but the uppermost first, each once."""
    untold = []
    at: _Directory | None = directory
    while at is not None and not at.told:
        untold.append(at)
        at = at.above
    for each in reversed(untold):
        each.told = True
        yield Change.CHANGED, each.path


def _is_covered(root: int, path: str) -> bool:
    """Whether a layer has something else there, or above, than a directory, or one that hides what is below."""
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        with visible([root], "/".join(parts[:depth])) as fd:
            if fd is None:
                return _has_whiteout(root, parts[:depth])
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                return True
        above = open_directory(root, "/".join(parts[:depth]))
        if above is not None:
            try:
                if _is_opaque(above):
                    return True
            finally:
                os.close(above)
    return False


def _has_whiteout(root: int, parts: Sequence[str]) -> bool:
    fd = open_directory(root, "/".join(parts[:-1]))
    if fd is None:
        return False
    try:
        return is_whiteout(os.stat(parts[-1], dir_fd=fd, follow_symlinks=False))
    except FileNotFoundError:
        return False
    finally:
        os.close(fd)


def _is_same(now: os.stat_result, before: os.stat_result) -> bool:
    """In what stat tells; of a directory the size says nothing."""
    if stat.S_ISDIR(now.st_mode):
        return _facts(now)[:3] == _facts(before)[:3] and now.st_mtime_ns == before.st_mtime_ns
    return _facts(now) == _facts(before) and now.st_mtime_ns == before.st_mtime_ns


def _facts(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_rdev


def _attributes(was: int) -> dict[bytes, bytes]:
    """Of what an O_PATH descriptor names."""
    return attributes_of(f"/proc/self/fd/{was}")


def _content_is_same(now: int, was: int) -> bool:
    before = os.open(f"/proc/self/fd/{was}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while data := os.pread(now, _CHUNK, offset):
            if data != os.pread(before, _CHUNK, offset):
                return False
            offset += len(data)
    finally:
        os.close(before)
    return True


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, _OPAQUE) == b"y"
    except OSError:
        return False
