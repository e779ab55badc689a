"""FS_NOCOW_FL: what is written over a file's blocks goes into these blocks, also where a file system copies on write.

Source: ioctl_iflags(2); btrfs(5), "FILE ATTRIBUTES".
"""

import fcntl
import struct
from contextlib import suppress

# _IOR('f', 1, long) and _IOW('f', 2, long), but the kernel reads and writes an int.
_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
_NOCOW = 0x00800000
_FLAGS = struct.Struct("i")


def write_in_place(fd: int) -> None:
    """Of an empty file, and where the file system knows such a thing; else all is as it was."""
    with suppress(OSError):
        [flags] = _FLAGS.unpack(fcntl.ioctl(fd, _GETFLAGS, bytes(_FLAGS.size)))
        fcntl.ioctl(fd, _SETFLAGS, _FLAGS.pack(flags | _NOCOW))
