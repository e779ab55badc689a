"""Mounting aufs with any number of branches, whose paths may have any length.

Source: aufs(5); aufs's fs/aufs/fsctx.c, opts.c and whout.c.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from corral.kernel import mount

# The options of a mount are read into one page: of text, or of some 80 records.
_AT_ONCE = 50

type Branch = tuple[str, str]


def new_aufs(options: Iterable[str], *, attributes: int = 0) -> int:
    """A new, detached aufs mount, from options as in mount(8): br=UPPER=rw:LOWER=ro+wh:…, flags.

    The inode numbers that it remembers lie in a tmpfs, which nobody sees and which goes with it. Raises OSError with
    the kernel's reason.
    """
    branches, flags = [], []
    for option in options:
        key, _, value = option.partition("=")
        if key == "br":
            branches += split_branches(value)
        else:
            flags.append(option)
    with ExitStack() as stack:
        numbers = mount.new_mount("tmpfs", "aufs", ("mode=700",), attributes=mount.MOUNT_ATTR_NODEV)
        stack.callback(os.close, numbers)
        named = tuple(_named(branches, stack))
        first = (*flags, *named[:_AT_ONCE], f"xino=/proc/self/fd/{numbers}/xino")
        tree = mount.new_mount("aufs", "aufs", first, attributes=attributes)
        try:
            for start in range(_AT_ONCE, len(named), _AT_ONCE):
                mount.reconfigure(tree, "aufs", named[start : start + _AT_ONCE])
        except BaseException:
            os.close(tree)
            raise
        return tree


def _named(branches: Sequence[Branch], stack: ExitStack) -> Iterator[str]:
    """The options that add them, from the top downwards. A directory is named by an fd, which is short."""
    key = "br"
    for directory, permission in branches:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        yield f"{key}=/proc/self/fd/{fd}={permission}"
        key = "append"


def split_branches(value: str) -> list[Branch]:
    """The directories of a br= value, each with its permission."""
    return [(directory, permission) for directory, _, permission in (one.rpartition("=") for one in value.split(":"))]


def join_branches(branches: Iterable[Branch]) -> str:
    """The reverse of split_branches(): neither ":" nor "," can be in a path."""
    return ":".join(f"{directory}={permission}" for directory, permission in branches)
