"""What a tree of changes, as overlayfs keeps them, adds to the layers below it, changes in them, and deletes."""

import os
import stat
from collections.abc import Iterator, Sequence
from enum import StrEnum

from corral.images.layers.below import is_whiteout, visible
from corral.images.layers.packing import open_directory


class Change(StrEnum):
    """The letters of `docker diff`."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"


def changes(root: int, below: Sequence[int]) -> Iterator[tuple[Change, str]]:
    """Paths, directory by directory; `below` are the layers' roots, the uppermost first. Of a directory that is gone,
    or stands in the place of another one, only what is there now is told."""
    waiting = [""]
    while waiting:
        path = waiting.pop()
        inner = []
        for name, status in _listed(root, path):
            inside = f"{path}/{name}" if path else name
            with visible(below, inside) as fd:
                was = fd is not None
            if is_whiteout(status):
                if was:
                    yield Change.DELETED, inside
                continue
            yield Change.CHANGED if was else Change.ADDED, inside
            if stat.S_ISDIR(status.st_mode):
                inner.append(inside)
        waiting += reversed(inner)


def _listed(root: int, path: str) -> list[tuple[str, os.stat_result]]:
    """What is in a directory, unless it has gone meanwhile."""
    fd = open_directory(root, path)
    if fd is None:
        return []
    found = []
    try:
        for name in sorted(os.listdir(fd), key=os.fsencode):  # noqa: PTH208 - a descriptor
            try:
                found.append((name, os.stat(name, dir_fd=fd, follow_symlinks=False)))
            except FileNotFoundError:
                continue
    finally:
        os.close(fd)
    return found
