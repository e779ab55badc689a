"""A file on a read-only mount of its own, asked for before anything was loaded: ctypes takes as long as half a start.

Of ctypes only the part in C is used, which takes one call by address and knows no prototypes: what is passed are ints
that fit in a register's half and bytes, and errno is not told.
"""

import _ctypes
import posix

_OPEN_TREE, _MOUNT_SETATTR = 428, 442
"""On every architecture."""
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE = 1
_READ_ONLY = (1).to_bytes(8, "little") + bytes(24)
"""struct mount_attr: MOUNT_ATTR_RDONLY is to be set, and nothing else changes. Little-endian, as both machines are."""


def read_only(path: bytes) -> int:
    """A descriptor of the file on a detached, read-only mount, close-on-exec; -1 where that can't be.

    What corral.shim.seal.read_only_mount does. Source: open_tree(2), mount_setattr(2).
    """
    library = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # as ctypes.CDLL(None)
    call, function = _ctypes.call_cdeclfunction, _ctypes.dlsym(library, "syscall")
    flags = _OPEN_TREE_CLONE | posix.O_CLOEXEC
    fd: int = call(function, (_OPEN_TREE, _AT_FDCWD, path, flags))
    if fd < 0:
        return -1
    if call(function, (_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, _READ_ONLY, len(_READ_ONLY))) != 0:
        posix.close(fd)
        return -1
    return fd
