"""Block devices: how large they are, whether they can be written, and giving back what is on them.

Source: linux/fs.h; ioctl_list(2).
"""

import fcntl
import struct

_GET_READ_ONLY = 0x125E  # BLKROGET
_DISCARD = 0x1277  # BLKDISCARD
_GET_SIZE = 0x80081272  # BLKGETSIZE64


def size_bytes(device: int) -> int:
    """Raises OSError: ENOTTY if it is no block device."""
    return int(struct.unpack("Q", fcntl.ioctl(device, _GET_SIZE, bytes(8)))[0])


def is_read_only(device: int) -> bool:
    """Raises OSError."""
    return bool(struct.unpack("i", fcntl.ioctl(device, _GET_READ_ONLY, bytes(4)))[0])


def discard(device: int, length_bytes: int) -> None:
    """Give back the first bytes of a device, of which nothing is wanted any more. Raises OSError."""
    fcntl.ioctl(device, _DISCARD, struct.pack("QQ", 0, length_bytes))
