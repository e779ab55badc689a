"""What a tree of changes, as overlayfs or aufs keeps it, adds to the layers below it, changes in them, and deletes."""

import os
import stat
from collections.abc import Iterator, Sequence
from enum import StrEnum

from corral.images.layers.below import visible
from corral.images.layers.hiding import Marks, listed
from corral.images.layers.packing import open_directory


class Change(StrEnum):
    """The letters of `docker diff`."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"


def changes(root: int, below: Sequence[int], marks: Marks = Marks.OVERLAY) -> Iterator[tuple[Change, str]]:
    """Paths, directory by directory; `below` are the layers' roots, the uppermost first. Of a directory that is gone,
    or stands in the place of another one, only what is there now is told."""
    waiting = [""]
    while waiting:
        path = waiting.pop()
        inner = []
        for name, status in _listed(root, path, marks):
            inside = f"{path}/{name}" if path else name
            with visible(below, inside, marks) as fd:
                was = fd is not None
            if status is None:
                if was:
                    yield Change.DELETED, inside
                continue
            yield Change.CHANGED if was else Change.ADDED, inside
            if stat.S_ISDIR(status.st_mode):
                inner.append(inside)
        waiting += reversed(inner)


def _listed(root: int, path: str, marks: Marks) -> list[tuple[str, os.stat_result | None]]:
    """What is in a directory, unless it has gone meanwhile; None: it hides what is below of that name."""
    fd = open_directory(root, path)
    if fd is None:
        return []
    try:
        return list(listed(fd, marks))
    finally:
        os.close(fd)
