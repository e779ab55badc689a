"""Trees that are file systems on block devices of their own: ext4, with the tree in a directory of it.

Beside the tree there may be ballast: an empty file that takes the room which the tree shall not have. Whoever sees the
tree alone sees nothing of it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from corral.images.layers.below import complete
from corral.images.layers.laying import lay
from corral.images.layers.removal import remove_tree
from corral.kernel import block, ext4
from corral.kernel.mount import MOUNT_ATTR_RDONLY, new_mount
from corral.kernel.syncfs import syncfs
from corral.store.measuring import measure_tree

TREE = "fs"
"""The directory that a tree is in."""
BALLAST = "ballast"
OPTIONS = ("discard", "noinit_itable")
"""What is deleted gives its room back, and inode tables, which read as zeros, are not filled with zeros."""
SPARE_BYTES = 10 << 30
"""Free in every layer: what a container without a quota can write, so that none has to wait for more."""
_SPARE_INODES = 65_536


@contextmanager
def mounted(device: Path | str, options: Sequence[str] = OPTIONS) -> Iterator[int]:
    """The root of the file system on a device, seen by us alone, for as long as the block lasts. Raises OSError.

    It may be in use by others, and is the same file system then. Writable if the device is.
    """
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_only = block.is_read_only(fd)
    finally:
        os.close(fd)
    attributes = MOUNT_ATTR_RDONLY if read_only else 0
    root = new_mount("ext4", str(device), ("ro",) if read_only else options, attributes=attributes)
    try:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    finally:
        os.close(root)
    try:
        yield directory
    finally:
        os.close(directory)


def fill(device: str, staged: Path, implicit: Sequence[str], links: Sequence[tuple[str, str]]) -> int:
    """Lay an unpacked layer on the tree of a device, and remove it where it was. Returns the bytes added.

    Raises OSError, BadLayer.
    """
    with mounted(device) as root:
        added = complete(staged, [tree_in(root)], implicit, links)
    size, inodes = measure_tree(staged)
    # Blocks of directories and of indexes may be more here than there.
    make_room(device, size + size // 8 + SPARE_BYTES, inodes=inodes + _SPARE_INODES)
    with mounted(device) as root:
        lay([staged], tree_in(root))
        syncfs(root)
    remove_tree(staged)
    return added


def tree_in(root: int) -> Path:
    """The tree of a mounted file system."""
    return Path(f"/proc/self/fd/{root}/{TREE}")


def make_room(device: Path | str, free_bytes: int, *, inodes: int = 0) -> None:
    """Make a file system, which nobody has mounted, so large that so much of it is free. Raises OSError."""
    # With what it is mounted otherwise, the kernel would write out the tables of all that is new, zeros, at once.
    with mounted(device, ()) as root, open(device, "rb", buffering=0) as file:
        unit = ext4.block_bytes(file.fileno())
        while (more := _lacking(root, free_bytes, inodes)) > 0:
            before = ext4.size_bytes(file.fileno())
            ext4.grow(root, min(before + more, block.size_bytes(file.fileno())) // unit)
            if ext4.size_bytes(file.fileno()) <= before:
                return  # the device has no more


def _lacking(root: int, free_bytes: int, inodes: int) -> int:
    """Bytes by which the file system is too small; new ones are in part taken by its own tables."""
    status = os.fstatvfs(root)
    per_inode = status.f_blocks * status.f_frsize // max(status.f_files, 1)
    bytes_short = free_bytes - status.f_bavail * status.f_frsize
    short = max(bytes_short, (inodes - status.f_favail) * per_inode)
    return short + short // 16 + (16 << 20) if short > 0 else 0


def bound(device: Path | str, limit_bytes: int) -> None:
    """Have the tree of a file system, which nobody has mounted, no more free room than that. Raises OSError."""
    make_room(device, limit_bytes)
    with mounted(device) as root:
        status = os.fstatvfs(root)
        more = status.f_bavail * status.f_frsize - limit_bytes
        if more > 0:
            fd = os.open(BALLAST, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=root)
            try:
                os.posix_fallocate(fd, 0, more)
            finally:
                os.close(fd)


def release(device: Path | str) -> None:
    """Undo bound(), and have it clean and synced. Raises OSError."""
    with mounted(device) as root:  # which plays its journal
        with suppress(FileNotFoundError):
            os.unlink(BALLAST, dir_fd=root)
        syncfs(root)
    make_room(device, SPARE_BYTES)
