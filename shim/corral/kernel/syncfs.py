"""syncfs(2): one flush for a whole tree of new files, where fsync would be needed for each."""

import ctypes

from corral.kernel.syscalls import check, libc

_syncfs = libc("syncfs", ctypes.c_int)


def syncfs(fd: int) -> None:
    """Write out everything of the file system that fd lies on. Raises OSError, also for an earlier failed write."""
    check(_syncfs(fd), "syncfs", f"/proc/self/fd/{fd}")
