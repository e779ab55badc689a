"""How a layer on disk says that it hides what lies below it, in either of two forms.

    overlay   NAME is a character device 0:0; trusted.overlay.opaque on a directory hides all that is below it
    aufs      a file .wh.NAME is there; a file .wh..wh..opq in a directory hides all that is below it

Other names that begin with .wh..wh. are aufs' own and say nothing.

Source: Documentation/filesystems/overlayfs.rst "whiteouts and opaque directories"; aufs(5); aufs's whout.c.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum

from corral.images.layers.apply import OPAQUE, OPAQUE_XATTR, WHITEOUT, WHITEOUT_META


class Marks(StrEnum):
    """See the module."""

    OVERLAY = "overlay"
    AUFS = "aufs"


def is_whiteout(status: os.stat_result) -> bool:
    """Of overlayfs. No layer holds such a device for its own sake, for none could be told from a whiteout."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def listed(directory: int, marks: Marks) -> Iterator[tuple[str, os.stat_result | None]]:
    """The names in an open directory, in byte order; None: it hides what is below of that name."""
    for name, entry in sorted(_names(directory, marks), key=lambda pair: os.fsencode(pair[0])):
        if name != entry:
            yield name, None
            continue
        with suppress(FileNotFoundError):  # it has gone meanwhile
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            yield name, None if is_whiteout(status) else status


def _names(directory: int, marks: Marks) -> Iterator[tuple[str, str]]:
    """What is there or hidden, and what says so."""
    for entry in os.listdir(directory):
        if marks is Marks.AUFS and entry.startswith(WHITEOUT):
            if not entry.startswith(WHITEOUT_META):
                yield entry.removeprefix(WHITEOUT), entry
        else:
            yield entry, entry


def is_opaque(directory: int, marks: Marks = Marks.OVERLAY) -> bool:
    """Of an open directory; O_PATH is enough."""
    try:
        if marks is Marks.AUFS:
            return stat.S_ISREG(os.stat(OPAQUE, dir_fd=directory, follow_symlinks=False).st_mode)
        return os.getxattr(f"/proc/self/fd/{directory}", OPAQUE_XATTR) == b"y"
    except OSError:
        return False


def has_whiteout(directory: int, name: str, marks: Marks) -> bool:
    """Whether something else in an open directory says that `name`, which is not there, is hidden."""
    if marks is not Marks.AUFS:
        return False
    try:
        return stat.S_ISREG(os.stat(WHITEOUT + name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False
