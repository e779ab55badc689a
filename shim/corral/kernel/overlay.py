"""Mounting overlayfs with any number of layers, whose paths may have any length."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator

from corral.kernel import mount
from corral.kernel.syscalls import AT_FDCWD, failure


def new_overlay(options: Iterable[str], *, attributes: int = 0, scratch: str) -> int:
    """A new, detached overlay mount, from options as in mount(8): lowerdir=A:B:…, upperdir=, workdir=, flags.

    scratch is a directory used as a mount point for a moment on kernels before 6.8, which can only be given all the
    layers as one string. Raises OSError with the kernel's reason.
    """
    options = tuple(options)
    try:
        return mount.new_mount("overlay", "overlay", _one_by_one(options), attributes=attributes)
    except OSError as e:
        if e.errno != errno.EINVAL or "lowerdir+" not in str(e):
            raise
    return _by_old_call(options, attributes, scratch)


def split_lower(value: str) -> list[str]:
    """The directories of a lowerdir= value; `\\:` is a colon and `\\\\` a backslash."""
    if "\\" not in value:
        return [part for part in value.split(":") if part]
    parts = [""]
    characters = iter(value)
    for character in characters:
        if character == ":":
            parts.append("")
        else:
            parts[-1] += next(characters, "") if character == "\\" else character
    return [part for part in parts if part]


def _one_by_one(options: Iterable[str]) -> Iterator[str]:
    for option in options:
        key, _, value = option.partition("=")
        if key == "lowerdir":
            yield from (f"lowerdir+={directory}" for directory in split_lower(value))
        else:
            yield option


def _by_old_call(options: Iterable[str], attributes: int, scratch: str) -> int:
    """mount(2), whose data is one page.

    A directory is opened and named by its fd, which is short. Layers, of which there are many, mostly lie side by side:
    their directory is made the working directory for a moment, and they are named from there, which is shorter still.
    """
    with contextlib.ExitStack() as stack:

        def opened(directory: str) -> int:
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        lower = [
            directory for option in options if option.startswith("lowerdir=") for directory in split_lower(option[9:])
        ]
        beside = os.path.dirname(lower[0]) if lower else "/"  # noqa: PTH120 - a string

        def short(directory: str) -> str:
            above, _, name = directory.rpartition("/")
            if above == beside and not set(name) & set(":,\\"):
                return name
            return f"/proc/self/fd/{opened(directory)}"

        data = [f"lowerdir={':'.join(map(short, lower))}"]
        for option in options:
            key, _, value = option.partition("=")
            if key in ("upperdir", "workdir"):
                data.append(f"{key}=/proc/self/fd/{opened(value)}")
            elif key != "lowerdir":
                data.append(option)
        text = ",".join(data)
        if len(text) > 4095:
            raise failure(errno.E2BIG, "mount overlay: too many layers for this kernel (Linux 6.8 has no limit)")
        where, here = opened(scratch), opened(".")
        os.chdir(beside)
        try:
            mount.mount("overlay", f"/proc/self/fd/{where}", "overlay", 0, text)
        finally:
            os.fchdir(here)
        try:
            tree = mount.clone_tree(AT_FDCWD, scratch)
        finally:
            mount.umount(scratch, mount.MNT_DETACH)
    mount.set_attributes(tree, attr_set=attributes)
    return tree
