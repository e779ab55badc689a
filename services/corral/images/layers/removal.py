"""Removing trees that somebody else filled, however deep they are.

A container can nest directories deeper than any path can name, and than a process may have descriptors: a removal that
descends would fail, and the disk stay full. So nothing descends: a directory below that is not empty is first moved up
to the top of the tree that is being removed. Two descriptors are enough, and no link is ever followed.
"""

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

_RESISTANCE = frozenset({errno.EPERM, errno.EACCES, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


type GoOn = Callable[[], bool]


def always() -> bool:
    return True


def remove_tree(path: Path, *, go_on: GoOn = always) -> None:
    """Remove the tree at `path`; nothing there is no error. What resists (an immutable file) is left for another time.

    So is the rest once `go_on`, which is asked now and then, says no.

    Raises OSError for what is no such resistance, an I/O error say.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    try:
        _empty(top, go_on)
    finally:
        os.close(top)
    _tolerating(os.rmdir, path)


def remove_below(name: str, parent: int) -> None:
    """Remove the directory `name` of `parent`, an open directory, and all in it. Raises OSError."""
    top = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        _empty(top, always)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def _empty(top: int, go_on: GoOn) -> None:
    """Remove all in `top`, pass after pass, as long as that gets somewhere."""
    count = 0
    moved = True
    while moved:
        moved = False
        for name, is_directory in _entries(top):
            if not go_on():
                return
            if not is_directory:
                _tolerating(partial(os.unlink, name, dir_fd=top))
            elif not _tolerating(partial(os.rmdir, name, dir_fd=top)):
                count, some = _flatten(name, top, count, go_on)
                moved = moved or some
                _tolerating(partial(os.rmdir, name, dir_fd=top))


def _flatten(name: str, top: int, count: int, go_on: GoOn) -> tuple[int, bool]:
    """Remove what is in the directory `name`, moving up what is not empty; whether there was any such."""
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=top)
    except FileNotFoundError:
        return count, False
    moved = False
    try:
        for below, is_directory in _entries(directory):
            if not go_on():
                return count, False
            if not is_directory:
                _tolerating(partial(os.unlink, below, dir_fd=directory))
            elif not _tolerating(partial(os.rmdir, below, dir_fd=directory)):
                count += 1
                moved = _move_up(below, directory, f".corral-removed-{count}", top) or moved
    finally:
        os.close(directory)
    return count, moved


def _move_up(name: str, directory: int, new_name: str, top: int) -> bool:
    try:
        os.rename(name, new_name, src_dir_fd=directory, dst_dir_fd=top)
    except OSError:
        # No room for one more name at the top of a full disk, or a taken one: then by descending.
        shutil.rmtree(name, ignore_errors=True, dir_fd=directory)
        return False
    return True


def _entries(directory: int) -> list[tuple[str, bool]]:
    os.lseek(directory, 0, os.SEEK_SET)  # btrfs shows only what was there when one went to the beginning
    with os.scandir(directory) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _tolerating(call: Callable[..., None], *arguments: object) -> bool:
    """Whether the removal succeeded; that it was refused is no error, nor that nothing was there."""
    try:
        call(*arguments)
    except FileNotFoundError:
        return True
    except OSError as e:
        if e.errno not in _RESISTANCE:
            raise
        return False
    return True
