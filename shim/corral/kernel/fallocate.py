"""fallocate(2) beyond the end of a file: room that is its own before anything is written there."""

import ctypes

from corral.kernel.syscalls import check, libc

KEEP_SIZE = 0x01

_fallocate = libc("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


def reserve(fd: int, start: int, bytes_: int) -> None:
    """Have so many bytes of a file, from `start` on, lie on its disk; its size stays as it is until they are written.

    Raises OSError: ENOSPC, or EOPNOTSUPP where the file system has no such thing.
    """
    check(_fallocate(fd, KEEP_SIZE, start, bytes_), "fallocate", f"/proc/self/fd/{fd}")
