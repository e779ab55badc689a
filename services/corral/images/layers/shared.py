"""A file system in a file that a container may have mounted already, where nobody else can see its mount.

Two devices on one file would destroy it. If there is one, its file system is mounted once more, which is the same one;
if there is none, one is made, and nobody else can make another meanwhile (corral.kernel.loop).
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from corral.kernel.loop import mount_file
from corral.kernel.mount import MOUNT_ATTR_RDONLY, new_mount, set_attributes


@contextmanager
def mounted_together(file: str) -> Iterator[int]:
    """The root of the ext4 file system in or on `file`, read-only for us alone. Raises OSError."""
    device = file if stat.S_ISBLK(os.stat(file).st_mode) else _device_of(file)  # noqa: PTH116 - a string
    if device is None:
        fd = mount_file("ext4", file, device=True)  # writable, since its journal may have to be played
    else:
        fd = new_mount("ext4", device)
    try:
        set_attributes(fd, attr_set=MOUNT_ATTR_RDONLY)
        yield fd
    finally:
        os.close(fd)


def _device_of(file: str) -> str | None:
    wanted = os.stat(file)  # noqa: PTH116 - a string
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            status = os.stat(backing.read_text("utf-8").rstrip("\n"))  # noqa: PTH116 - a string
        except OSError:  # it has just gone, or is out of our sight
            continue
        if os.path.samestat(status, wanted):
            return f"/dev/{backing.parent.parent.name}"
    return None
