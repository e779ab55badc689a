"""Changes in directories, read from a descriptor. Source: inotify(7)."""

import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from corral.kernel.syscalls import Path, check, libc

IN_MODIFY = 0x00000002
IN_MOVED_TO = 0x00000080
IN_CREATE = 0x00000100
IN_Q_OVERFLOW = 0x00004000
IN_ONLYDIR = 0x01000000

_CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK
_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows
_READ_SIZE = 64 << 10

_init1 = libc("inotify_init1", ctypes.c_int)
_add_watch = libc("inotify_add_watch", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_rm_watch = libc("inotify_rm_watch", ctypes.c_int, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened under a watch; with IN_Q_OVERFLOW (and watch -1) changes were lost, under any watch."""

    watch: int
    mask: int


def open_inotify() -> int:
    """A non-blocking descriptor that becomes readable. A user has some 128 of them: share one."""
    return check(_init1(_CLOEXEC_NONBLOCK), "inotify_init1")


def add_watch(fd: int, directory: Path, mask: int) -> int:
    """Watch a directory; watching the same one again gives the same number, with the new mask."""
    return check(_add_watch(fd, os.fsencode(directory), mask | IN_ONLYDIR), "inotify_add_watch", directory)


def remove_watch(fd: int, watch: int) -> None:
    """Stop a watch. Raises OSError(EINVAL) if it is gone, as after the directory was removed."""
    check(_rm_watch(fd, watch), "inotify_rm_watch")


def read_changes(fd: int) -> Iterator[Change]:
    """What happened since the last call."""
    try:
        data = os.read(fd, _READ_SIZE)
    except BlockingIOError:
        return
    offset = 0
    while offset < len(data):
        watch, mask, _, length = _EVENT.unpack_from(data, offset)
        yield Change(watch, mask)
        offset += _EVENT.size + length
