"""Subvolumes of btrfs: made, copied and destroyed in no time, however large.

Source: linux/btrfs.h; btrfs-ioctl(2).
"""

import errno
import fcntl
import os
import struct

MAGIC = 0x9123683E  # BTRFS_SUPER_MAGIC, of statfs(2)

_SUBVOL_CREATE = 0x5000940E  # _IOW(0x94, 14, struct btrfs_ioctl_vol_args)
_SNAP_DESTROY = 0x5000940F  # _IOW(0x94, 15, struct btrfs_ioctl_vol_args)
_SNAP_CREATE_V2 = 0x50009417  # _IOW(0x94, 23, struct btrfs_ioctl_vol_args_v2)
_INO_LOOKUP = 0xD0009412  # _IOWR(0x94, 18, struct btrfs_ioctl_ino_lookup_args)
_QUOTA_CTL = 0xC0109428  # _IOWR(0x94, 40, struct btrfs_ioctl_quota_ctl_args)
_QGROUP_LIMIT = 0x8030942B  # _IOR(0x94, 43, struct btrfs_ioctl_qgroup_limit_args)
_QUOTA_RESCAN_WAIT = 0x942E  # _IO(0x94, 46)

_VOL_ARGS = struct.Struct("q4088s")
_VOL_ARGS_V2 = struct.Struct("qQQ32x4040s")
_LOOKUP_ARGS = struct.Struct("QQ4080x")
_FIRST_FREE_OBJECTID = 256  # the number of a subvolume's root directory
_ENABLE = 1  # BTRFS_QUOTA_CTL_ENABLE
_LIMIT_MAX_EXCL = 1 << 1  # BTRFS_QGROUP_LIMIT_MAX_EXCL
_NO_LIMIT = (1 << 64) - 1
_NOT_COUNTING = frozenset((errno.ENOTCONN, errno.EINVAL))


def create_subvolume(parent: int, name: str) -> None:
    """An empty subvolume called name in the directory parent. Raises OSError."""
    _name(parent, _SUBVOL_CREATE, _VOL_ARGS.pack(0, name.encode()), name)


def snapshot(source: int, parent: int, name: str) -> None:
    """A writable copy of the subvolume whose root source is, called name in the directory parent. Raises OSError."""
    _name(parent, _SNAP_CREATE_V2, _VOL_ARGS_V2.pack(source, 0, 0, name.encode()), name)


def destroy_subvolume(parent: int, name: str) -> None:
    """Remove a subvolume with all in it but other subvolumes.

    Raises OSError: ENOTEMPTY if there are such, EINVAL if it is a directory.
    """
    _name(parent, _SNAP_DESTROY, _VOL_ARGS.pack(0, name.encode()), name)


def is_subvolume(directory: int) -> bool:
    """Whether a directory on btrfs is the root of a subvolume."""
    return os.fstat(directory).st_ino == _FIRST_FREE_OBJECTID


def limit_exclusive(subvolume: int, limit_bytes: int) -> None:
    """Bound what a subvolume takes beyond what it shares with others. EDQUOT is what writers get then.

    Raises OSError.
    """
    try:
        _limit(subvolume, limit_bytes)
    except OSError as e:
        if e.errno not in _NOT_COUNTING:
            raise
        _enable_quota(subvolume)
        _limit(subvolume, limit_bytes)


def lift_limit(subvolume: int) -> None:
    """Take the bound off, which every snapshot of it would have as well. None there is no error. Raises OSError."""
    try:
        _limit(subvolume, _NO_LIMIT)
    except OSError as e:
        if e.errno not in _NOT_COUNTING:
            raise


def _limit(subvolume: int, limit_bytes: int) -> None:
    found = bytearray(_LOOKUP_ARGS.pack(0, _FIRST_FREE_OBJECTID))
    fcntl.ioctl(subvolume, _INO_LOOKUP, found)
    tree_id, _ = _LOOKUP_ARGS.unpack(found)
    fcntl.ioctl(subvolume, _QGROUP_LIMIT, struct.pack("QQQQQQ", tree_id, _LIMIT_MAX_EXCL, 0, limit_bytes, 0, 0))


def _enable_quota(directory: int) -> None:
    """Have the file system count. It goes through all that is there once."""
    fcntl.ioctl(directory, _QUOTA_CTL, struct.pack("QQ", _ENABLE, 0))
    fcntl.ioctl(directory, _QUOTA_RESCAN_WAIT)


def _name(parent: int, request: int, arguments: bytes, name: str) -> None:
    try:
        fcntl.ioctl(parent, request, bytearray(arguments))  # bytes may have 1,024 at most
    except OSError as e:
        raise OSError(e.errno, e.strerror, name) from e
