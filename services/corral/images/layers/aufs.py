"""Making of an unpacked layer one that aufs can stack, and of what aufs has written to a layer.

Whiteouts and opaque directories are told in aufs' own form then (corral.images.layers.hiding); directories stay as old
as they were.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from corral.images.layers.apply import OPAQUE, OPAQUE_XATTR, WHITEOUT, WHITEOUT_META
from corral.images.layers.errors import BadLayer
from corral.images.layers.hiding import is_opaque, is_whiteout
from corral.images.layers.laying import open_deep
from corral.images.layers.removal import remove_tree

MAX_NAME_BYTES = 255 - 2 * len(WHITEOUT) - 1 - 4
"""In each name aufs keeps room for two prefixes and the number of a directory on its way out."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MARK = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def convert(layer: Path, *, bottom: bool) -> None:
    """Of a layer as it is unpacked. bottom: nothing lies below it, so it need not tell what it hides.

    Raises OSError, BadLayer for names that aufs cannot show.
    """
    root = os.open(layer, _DIRECTORY)
    waiting: list[tuple[str, ...]] = [()]
    try:
        while waiting:
            parts = waiting.pop()
            fd = open_deep(root, parts)
            try:
                waiting += ((*parts, name) for name in _convert(fd, hides=not bottom, opaque=bool(parts)))
            finally:
                os.close(fd)
    finally:
        os.close(root)


def _convert(directory: int, *, hides: bool, opaque: bool) -> list[str]:
    """One directory; returns those in it. opaque: it may be so, which a root may not."""
    status = os.fstat(directory)
    with os.scandir(directory) as found:
        entries = list(found)
    for entry in entries:
        if entry.name.startswith(WHITEOUT):  # a directory on the way to something: aufs would fail over it
            raise BadLayer(f"the name {entry.name[:60]!r} is one that aufs keeps for itself")
        if len(os.fsencode(entry.name)) > MAX_NAME_BYTES:
            raise BadLayer(f"the name {entry.name[:60]!r}… has more than the {MAX_NAME_BYTES} bytes that aufs takes")
        if _may_be_device(entry) and is_whiteout(entry.stat(follow_symlinks=False)):
            os.unlink(entry.name, dir_fd=directory)
            if hides:
                _mark(WHITEOUT + entry.name, directory)
    if is_opaque(directory):
        os.removexattr(directory, OPAQUE_XATTR)
        if hides and opaque:
            _mark(OPAQUE, directory)
    os.utime(directory, ns=(status.st_atime_ns, status.st_mtime_ns))
    return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _may_be_device(entry: os.DirEntry[str]) -> bool:
    return not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) or entry.is_symlink())


def _mark(name: str, directory: int) -> None:
    os.close(os.open(name, _MARK, 0o444, dir_fd=directory))


def kept_for_itself(upper: Path) -> Iterator[os.stat_result]:
    """What aufs has put into the root of what it writes to, and nothing of what was written is yet."""
    for name in ("aufs", "orph"):
        with suppress(FileNotFoundError):
            status = (upper / f"{WHITEOUT_META}{name}").lstat()
            if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1:  # else it is the whiteouts as well
                yield status


def clean(upper: Path) -> None:
    """Remove what aufs keeps for itself in the root of what it has written to. Raises OSError."""
    for path in upper.iterdir():
        if not path.name.startswith(WHITEOUT_META) or path.name == OPAQUE:
            continue
        if stat.S_ISDIR(path.lstat().st_mode):
            remove_tree(path)
        else:
            with suppress(FileNotFoundError):
                path.unlink()
