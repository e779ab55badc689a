"""A directory tree that is being filled from an archive, seen from its root: nothing can be reached outside of it.

Parents are resolved by the kernel, held inside the root (openat2 RESOLVE_IN_ROOT), and used by descriptor; the last
component is never followed. The tree is nobody else's while it is filled, but the archive may plant links in it.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from corral.images.layers.errors import BadLayer
from corral.images.layers.removal import remove_below
from corral.kernel.paths import open_in_root

# Of the paths of directories that no entry describes: honest layers have a few. Each is looked up in every layer below.
MAX_IMPLICIT_BYTES = 8 << 20
TOO_MUCH_IMPLICIT = "it has too many or too long paths of directories that no entry describes"

_CACHED_PARENTS = 64
_MAX_LINKS = 40
_IMPLICIT_MODE = 0o755
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def components(name: bytes) -> list[str]:
    """The parts of an entry's name below the root; a leading "/" means the root. Raises BadLayer for "..": it is what
    archives escape with, and no honest one has it."""
    parts = [part for part in os.fsdecode(name).split("/") if part and part != "."]
    if ".." in parts:
        raise BadLayer(f"entry {os.fsdecode(name)[:200]!r} climbs with '..' and could leave the root file system")
    return parts


class Tree:
    """An open root and the parents used last."""

    def __init__(self, path: Path) -> None:
        self.root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Entries come grouped by directory, so few are open at a time.
        self._parents: dict[str, int] = {}
        # Directories that no entry described (yet), made because something lies below them.
        self.implicit: set[str] = set()
        self._noted_bytes = 0

    def close(self) -> None:
        self.forget()
        os.close(self.root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def parent(self, parts: list[str]) -> int:
        """The directory of all `parts` but the last; the descriptor stays this object's. What is missing is made."""
        if len(parts) == 1:
            return self.root
        path = "/".join(parts[:-1])
        fd = self._parents.get(path)
        if fd is None:
            fd = self._open_or_make(path)
            if len(self._parents) >= _CACHED_PARENTS:
                os.close(self._parents.pop(next(iter(self._parents))))
            self._parents[path] = fd
        return fd

    def find_parent(self, parts: list[str]) -> int | None:
        """As parent(), but nothing is made; None where it is missing."""
        if len(parts) > 1 and (fd := self._parents.get("/".join(parts[:-1]))) is not None:
            return fd
        try:
            with self._opened(parts[:-1]):
                return self.parent(parts)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            if e.errno != errno.ELOOP:  # links that lead in a circle lead nowhere
                raise
            return None

    @contextmanager
    def _opened(self, parts: list[str]) -> Iterator[int]:
        fd = open_in_root(self.root, "/".join(parts) or ".", os.O_PATH | os.O_DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)

    def forget(self) -> None:
        """To be called when a directory or a link went away: what it was resolved to is no longer true."""
        while self._parents:
            os.close(self._parents.popitem()[1])

    def remove(self, name: str, parent: int) -> None:
        """Remove whatever `name` is, if it is."""
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            # Cached descriptors may point into it, also `parent` itself: never below `name`, so it outlives this.
            kept = os.dup(parent)
            try:
                self._forget_but(parent)
                remove_below(name, kept)
            finally:
                os.close(kept)
        else:
            os.unlink(name, dir_fd=parent)
            if stat.S_ISLNK(mode):
                self._forget_but(parent)

    def _forget_but(self, keep: int) -> None:
        for path in [path for path, fd in self._parents.items() if fd != keep]:
            os.close(self._parents.pop(path))

    def _open_or_make(self, path: str) -> int:
        try:
            return open_in_root(self.root, path, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            return self._make(path)
        except OSError as e:
            raise _not_a_directory(e, path) from e

    def _make(self, path: str) -> int:
        """Make what is missing of the path; a dangling link is followed, inside the root."""
        for _ in range(_MAX_LINKS):
            parts = [part for part in path.split("/") if part and part != "."]
            there = self._there(parts)
            if there == len(parts):
                return open_in_root(self.root, path, os.O_PATH | os.O_DIRECTORY)
            with self._opened(parts[:there]) as above:
                target = self._make_first(parts[: there + 1], above)
                if target is None:
                    self._make_rest(parts, there, above)
                    continue
            base = [] if target.startswith("/") else parts[:there]
            path = "/".join([*base, target, *parts[there + 1 :]])
        raise BadLayer(f"the links at {path[:200]!r} lead in a circle")

    def _there(self, parts: list[str]) -> int:
        """How many of the parts are there, found by halves: to resolve a path takes as long as it is, and links in it
        can make it thousands of times longer."""
        low, high = 0, len(parts)
        while low < high:
            middle = (low + high + 1) // 2
            try:
                with self._opened(parts[:middle]):
                    low = middle
            except OSError:
                high = middle - 1
        return low

    def _make_first(self, parts: list[str], above: int) -> str | None:
        """Make the last one of `parts`, which lies in `above`. Where a dangling link is: what it says."""
        path = "/".join(parts)
        try:
            with self._opened(parts):
                return None
        except FileNotFoundError:
            pass
        except OSError as e:
            raise _not_a_directory(e, path) from e
        try:
            os.mkdir(parts[-1], _IMPLICIT_MODE, dir_fd=above)
        except FileExistsError:
            return os.readlink(parts[-1], dir_fd=above)
        self._note(path)
        return None

    def _note(self, path: str) -> None:
        """A directory was made that no entry has described."""
        self.implicit.add(path)
        self._noted_bytes += len(path)
        if self._noted_bytes > MAX_IMPLICIT_BYTES:
            raise BadLayer(TOO_MUCH_IMPLICIT)

    def _make_rest(self, parts: list[str], there: int, above: int) -> None:
        """Make what is below the first one that was missing, so that there is nothing to resolve, up to a step back:
        that one is the kernel's to take, inside the root."""
        fd = os.dup(above)
        try:
            for depth in range(there, len(parts)):
                if parts[depth] == "..":
                    break
                if depth > there:
                    os.mkdir(parts[depth], _IMPLICIT_MODE, dir_fd=fd)
                    self._note("/".join(parts[: depth + 1]))
                below = os.open(parts[depth], _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        finally:
            os.close(fd)


def _not_a_directory(e: OSError, path: str) -> OSError | BadLayer:
    if e.errno == errno.ENOTDIR:
        return BadLayer(f"an entry lies below {path[:200]!r}, which is not a directory")
    if e.errno == errno.ELOOP:
        return BadLayer(f"the links at {path[:200]!r} lead in a circle")
    if e.errno == errno.ENAMETOOLONG:
        return BadLayer(f"the path {path[:60]!r}… has a part that is too long for a file system")
    return e
