"""Mounting aufs with any number of branches, whose paths may have any length.

Source: aufs(5); aufs's fs/aufs/fsctx.c, opts.c and whout.c.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from corral.kernel import mount

# The options of a mount are read into one page: of text, or of some 80 records.
_AT_ONCE = 50

type Branch = tuple[str, str]


def new_aufs(options: Iterable[str], *, attributes: int = 0) -> int:
    """A new, detached aufs mount, from options as in mount(8): br=UPPER=rw:LOWER=ro+wh:…, flags.

    The inode numbers that it remembers lie in a tmpfs, which nobody sees and which goes with it. Raises OSError with
    the kernel's reason.
    """
    branches: list[Branch] = []
    flags = []
    for option in options:
        key, _, value = option.partition("=")
        if key == "br":
            branches += split_branches(value)
        else:
            flags.append(option)
    numbers = mount.new_mount("tmpfs", "aufs", ("mode=700",), attributes=mount.MOUNT_ATTR_NODEV)
    try:
        with _appended(branches[:_AT_ONCE]) as first:
            options = (*flags, *first, f"xino=/proc/self/fd/{numbers}/xino")
            tree = mount.new_mount("aufs", "aufs", options, attributes=attributes)
    finally:
        os.close(numbers)
    try:
        for start in range(_AT_ONCE, len(branches), _AT_ONCE):
            with _appended(branches[start : start + _AT_ONCE]) as more:
                mount.reconfigure(tree, "aufs", more)
    except BaseException:
        os.close(tree)
        raise
    return tree


@contextmanager
def _appended(branches: Iterable[Branch]) -> Iterator[list[str]]:
    """The options that add them. A directory is named by an fd, which is short, for as long as the options are read."""
    with ExitStack() as stack:
        options = []
        for directory, permission in branches:
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            options.append(f"append=/proc/self/fd/{fd}={permission}")
        yield options


def split_branches(value: str) -> list[Branch]:
    """The directories of a br= value, each with its permission."""
    return [(directory, permission) for directory, _, permission in (one.rpartition("=") for one in value.split(":"))]


def join_branches(branches: Iterable[Branch]) -> str:
    """The reverse of split_branches(): neither ":" nor "," can be in a path."""
    return ":".join(f"{directory}={permission}" for directory, permission in branches)
