"""Subvolumes of btrfs: made, copied and destroyed in no time, however large.

Source: linux/btrfs.h; btrfs-ioctl(2).
"""

import contextlib
import errno
import fcntl
import os
import struct
import uuid

MAGIC = 0x9123683E  # BTRFS_SUPER_MAGIC, of statfs(2)

_SUBVOL_CREATE = 0x5000940E  # _IOW(0x94, 14, struct btrfs_ioctl_vol_args)
_SNAP_DESTROY = 0x5000940F  # _IOW(0x94, 15, struct btrfs_ioctl_vol_args)
_SNAP_CREATE_V2 = 0x50009417  # _IOW(0x94, 23, struct btrfs_ioctl_vol_args_v2)
_INO_LOOKUP = 0xD0009412  # _IOWR(0x94, 18, struct btrfs_ioctl_ino_lookup_args)
_FS_INFO = 0x8400941F  # _IOR(0x94, 31, struct btrfs_ioctl_fs_info_args)
_QGROUP_ASSIGN = 0x40189429  # _IOW(0x94, 41, struct btrfs_ioctl_qgroup_assign_args)
_QGROUP_CREATE = 0x4010942A  # _IOW(0x94, 42, struct btrfs_ioctl_qgroup_create_args)
_QGROUP_LIMIT = 0x8030942B  # _IOR(0x94, 43, struct btrfs_ioctl_qgroup_limit_args)

_VOL_ARGS = struct.Struct("q4088s")
_VOL_ARGS_V2 = struct.Struct("qQQ32x4040s")
_LOOKUP_ARGS = struct.Struct("QQ4080x")
_FIRST_FREE_OBJECTID = 256  # the number of a subvolume's root directory
_FS_INFO_BYTES = 1024
_GROUP_LEVEL = 1 << 48  # BTRFS_QGROUP_LEVEL_SHIFT; level 0 are the subvolumes themselves
_LIMIT_MAX_RFER = 1 << 0  # BTRFS_QGROUP_LIMIT_MAX_RFER
# Quotas are off, there is no such group, or others are in it.
_NOT_BOUND = frozenset((errno.ENOTCONN, errno.EINVAL, errno.ENOENT, errno.EBUSY))


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


def counts_simply(directory: int) -> bool:
    """Whether the file system that a directory lies on has simple quotas on: with those, subvolumes that are made in a
    bounded one are bounded as well. Raises OSError.

    Source: btrfs-quota(8) "simple quotas"; /sys/fs/btrfs/<uuid>/qgroups.
    """
    found = bytearray(_FS_INFO_BYTES)
    try:
        fcntl.ioctl(directory, _FS_INFO, found)
        with open(f"/sys/fs/btrfs/{uuid.UUID(bytes=bytes(found[16:32]))}/qgroups/mode", encoding="ascii") as mode:
            return mode.read().strip() == "squota"
    except OSError as e:
        if e.errno in (errno.ENOTTY, errno.ENOENT):  # it is not on btrfs, or has no quotas
            return False
        raise


def limit(subvolume: int, limit_bytes: int, *, outside: int) -> None:
    """Bound what is written to a subvolume and to those that are made in it. EDQUOT is what writers get then.

    It becomes a member of a group of its own, since a limit on itself would be left by making another subvolume.
    outside: a directory of the same file system that is not bounded, through which the kernel is asked: in one that is
    full, it refuses. Simple quotas have to be on, else this raises OSError.
    """
    member = _number(subvolume)
    group = _GROUP_LEVEL | member
    with contextlib.suppress(FileExistsError):
        fcntl.ioctl(outside, _QGROUP_CREATE, struct.pack("QQ", 1, group))
    with contextlib.suppress(FileExistsError):
        fcntl.ioctl(outside, _QGROUP_ASSIGN, struct.pack("QQQ", 1, member, group))
    fcntl.ioctl(outside, _QGROUP_LIMIT, struct.pack("QQQQQQ", group, _LIMIT_MAX_RFER, limit_bytes, 0, 0, 0))


def lift_limit(subvolume: int, *, outside: int) -> None:
    """Take the bound off again. None there is no error. Raises OSError.

    The group stays as long as there are subvolumes that were made in it.
    """
    member = _number(subvolume)
    group = _GROUP_LEVEL | member
    for request, arguments in (
        (_QGROUP_ASSIGN, struct.pack("QQQ", 0, member, group)),
        (_QGROUP_CREATE, struct.pack("QQ", 0, group)),
    ):
        try:
            fcntl.ioctl(outside, request, arguments)
        except OSError as e:
            if e.errno not in _NOT_BOUND:
                raise


def _number(subvolume: int) -> int:
    found = bytearray(_LOOKUP_ARGS.pack(0, _FIRST_FREE_OBJECTID))
    fcntl.ioctl(subvolume, _INO_LOOKUP, found)
    tree_id, _ = _LOOKUP_ARGS.unpack(found)
    return int(tree_id)


def _name(parent: int, request: int, arguments: bytes, name: str) -> None:
    try:
        fcntl.ioctl(parent, request, bytearray(arguments))  # bytes may have 1,024 at most
    except OSError as e:
        raise OSError(e.errno, e.strerror, name) from e
