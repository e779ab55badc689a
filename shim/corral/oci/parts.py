"""Mounts that a container's root is put together from: layers that are file systems themselves, or a file to write in.

The runtime makes them before init is born, which in its cgroup may open no block device. They are detached: nobody else
ever sees them, and when their fds are closed they are gone. Init puts them where the root will be, one upon the other,
in its own mount namespace, because before Linux 6.15 only what is mounted somewhere can be used; then the root covers
them, and pivot_root leaves them behind.

In the root's source, and in the paths of its options, "@0" is the first of them and "@1/u" a directory in the second.
"""

import contextlib
import os
from collections.abc import Sequence

from corral.kernel import mount
from corral.kernel.aufs import join_branches, split_branches
from corral.kernel.fuse import mount_served
from corral.kernel.loop import mount_file
from corral.kernel.overlay import split_lower
from corral.kernel.syscalls import AT_FDCWD
from corral.oci import mount_options
from corral.oci.spec import Mount

_PATHS = frozenset(("lowerdir", "upperdir", "workdir"))


def make_parts(mounts: Sequence[Mount], stack: contextlib.ExitStack) -> tuple[int, ...]:
    """The fds of detached mounts; the stack closes them. Raises OSError, ValueError naming an option."""
    made = []
    for each in mounts:
        made.append(_make(each))
        stack.callback(os.close, made[-1])
    return tuple(made)


def attach(parts: Sequence[int], where: str) -> None:
    """Put the parts on a directory, in the caller's own mount namespace."""
    for part in parts:
        mount.move_mount(part, AT_FDCWD, where, follow=True, what="part of the root", where=where)


def located(path: str, parts: Sequence[int]) -> str:
    """A path that may begin with "@N", as this process finds it."""
    if not path.startswith("@"):
        return path
    number, slash, rest = path[1:].partition("/")
    return f"/proc/self/fd/{parts[int(number)]}{slash}{rest}"


def located_options(options: Sequence[str], parts: Sequence[int]) -> tuple[str, ...]:
    """Options of an overlay or of aufs, with every path as this process finds it."""
    return tuple(_located_option(option, parts) for option in options)


def _located_option(option: str, parts: Sequence[int]) -> str:
    key, _, value = option.partition("=")
    if key == "br":
        branches = ((located(directory, parts), permission) for directory, permission in split_branches(value))
        return f"br={join_branches(branches)}"
    if key not in _PATHS:
        return option
    if key != "lowerdir":
        return f"{key}={located(value, parts)}"
    return f"lowerdir={':'.join(_escaped(located(directory, parts)) for directory in split_lower(value))}"


def _escaped(directory: str) -> str:
    return directory.replace("\\", "\\\\").replace(":", "\\:")


def _make(part: Mount) -> int:
    options = mount_options.parse(part.options)
    attributes = options.attributes.set | (options.attributes.atime or 0)
    data = tuple(option for option in options.data if option != "loop")
    if attributes & mount.MOUNT_ATTR_RDONLY:  # the device may be, and then its file system has to be told
        data = (*data, "ro")
    family, _, subtype = part.type.partition(".")
    if family == "fuse" and subtype:  # the source is the program
        return mount_served(part.source, data, subtype=subtype, attributes=attributes)
    return mount_file(part.type, part.source, data, attributes=attributes, device="loop" in options.data)
