"""Making a mounted ext4 file system larger.

Source: fs/ext4/ioctl.c; Documentation/filesystems/ext4/super.rst.
"""

import fcntl
import os
import struct

_RESIZE = 0x40086610  # EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64)
_SUPER_OFFSET, _BLOCKS_LOW, _LOG_BLOCK_SIZE, _BLOCKS_HIGH = 1024, 0x4, 0x18, 0x150


def size_bytes(device: int) -> int:
    """Of the file system on an open device, which may be mounted. Raises OSError."""
    super_block = os.pread(device, 1024, _SUPER_OFFSET)
    [low], [high] = (struct.unpack_from("<I", super_block, at) for at in (_BLOCKS_LOW, _BLOCKS_HIGH))
    return int(low | high << 32) * block_bytes(device)


def block_bytes(device: int) -> int:
    """Raises OSError."""
    return int(1024 << struct.unpack("<I", os.pread(device, 4, _SUPER_OFFSET + _LOG_BLOCK_SIZE))[0])


def grow(root: int, blocks: int) -> None:
    """Give a mounted file system so many blocks, which its device has. root: an fd of a directory of it.

    Raises OSError.
    """
    fcntl.ioctl(root, _RESIZE, struct.pack("Q", blocks))
