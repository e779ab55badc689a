"""Files as block devices, for as long as they are mounted.

Source: loop(4); linux/loop.h.
"""

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterable

from corral.kernel import mount
from corral.kernel.syscalls import failure

_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A  # Linux 5.8
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
# struct loop_config: fd, block_size, struct loop_info64 up to lo_flags, its file name, the rest of both.
_CONFIG = struct.Struct("=II 40x 12xI 64s 112x 64x")
_NAME_BYTES = 63
_TRIES = 64
BUSY_S = 5.0
"""How long to wait for a file that is still a device: what was unmounted just now goes a moment later."""


def mount_file(
    fstype: str, path: str, options: Iterable[str] = (), *, attributes: int = 0, device: bool = False
) -> int:
    """A new, detached mount of the file system in a file: an fd of its root. Raises OSError naming the file.

    By a loop device if asked for, or where this kernel has no other way (erofs before Linux 6.12).
    """
    options = tuple(options)
    if not device:
        try:
            return mount.new_mount(fstype, path, options, attributes=attributes)
        except OSError as e:
            if e.errno != errno.ENOTBLK:
                raise
    read_only = bool(attributes & mount.MOUNT_ATTR_RDONLY)
    fd = attach(path, read_only=read_only)
    try:
        flags = (*options, "ro") if read_only else options
        return mount.new_mount(fstype, f"/proc/self/fd/{fd}", flags, attributes=attributes)
    finally:
        os.close(fd)


def attach(path: str, *, read_only: bool = False) -> int:
    """An open loop device whose content is the file at `path`. It goes when it is closed and unmounted everywhere.

    A file can be written by one device only, else it would be lost: whoever comes second waits, and gets EBUSY. So does
    whoever comes while others read. Raises OSError naming the file.
    """
    backing = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        # The device keeps this open file, and with it the lock, until it goes.
        _lock(backing, fcntl.LOCK_SH if read_only else fcntl.LOCK_EX, path)
        return _attach(backing, path, read_only=read_only)
    finally:
        os.close(backing)


def _lock(backing: int, kind: int, path: str) -> None:
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            fcntl.flock(backing, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise failure(errno.EBUSY, "loop device: the file is in use as another one", path) from None
            time.sleep(0.02)


def _attach(backing: int, path: str, *, read_only: bool) -> int:
    flags = _AUTOCLEAR | (_READ_ONLY if read_only else _DIRECT_IO)
    config = bytearray(_CONFIG.pack(backing, 0, flags, os.fsencode(path)[-_NAME_BYTES:]))
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, _CTL_GET_FREE)
            device = os.open(f"/dev/loop{number}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as e:
                os.close(device)
                if e.errno != errno.EBUSY:  # else somebody else took it meanwhile
                    raise OSError(e.errno, f"loop device: {e.strerror}", path) from e
            else:
                return device
    finally:
        os.close(control)
    raise failure(errno.EBUSY, "loop device: others take every free one", path)
