"""The content of files, copied as cheaply as their file systems can: blocks are shared, or go within the kernel.

Source: ioctl_ficlone(2), copy_file_range(2), lseek(2) "Seeking file data and holes".
"""

import errno
import fcntl
import os

_FICLONE = 0x40049409  # _IOW(0x94, 9, int)
# The file system cannot, or not with this one: a copy is made then.
_CANNOT_CLONE = frozenset((errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ETXTBSY, errno.EPERM))
_MAX_RANGE = 1 << 30


def clone_file(source: int, target: int) -> bool:
    """Make target, an empty file open for writing, share all blocks of source; False if they cannot.

    Raises OSError for any other reason, a full disk say.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as e:
        if e.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def copy_file(source: int, target: int, size: int) -> None:
    """Copy the first `size` bytes of source to target, an empty file; holes stay holes. Raises OSError."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            break  # nothing but a hole is left
        end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        _copy_range(source, target, start, end)
        offset = end
    os.ftruncate(target, size)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            copied = os.copy_file_range(source, target, min(end - start, _MAX_RANGE), start, start)
        except OSError as e:
            if e.errno not in _CANNOT_CLONE:
                raise
            copied = _copy_by_hand(source, target, start, end)
        if not copied:  # it became shorter meanwhile
            return
        start += copied


def _copy_by_hand(source: int, target: int, start: int, end: int) -> int:
    data = os.pread(source, min(end - start, 1 << 20), start)
    return os.pwrite(target, data, start)
