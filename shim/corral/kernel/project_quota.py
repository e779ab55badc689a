"""Bounding what a directory takes: all that is made in it belongs to a project, and the project has a limit.

Every file system counts projects for itself, by a number that nobody hands out. So a number is drawn that has no limit
and no file there, out of so many that two who draw at once do not draw the same.
Source: quotactl(2); ioctl_xfs_fsgetxattr(2); linux/fs.h; linux/quota.h.
"""

import ctypes
import errno
import fcntl
import secrets
import struct
from dataclasses import dataclass

from corral.kernel.syscalls import check, syscall

_FSGETXATTR = 0x801C581F  # _IOR('X', 31, struct fsxattr)
_FSSETXATTR = 0x401C5820  # _IOW('X', 32, struct fsxattr)
_FSXATTR = struct.Struct("=IIIII8x")  # xflags, extsize, nextents, projid, cowextsize
_PROJINHERIT = 0x200  # FS_XFLAG_PROJINHERIT

_PRJQUOTA = 2
_GETQUOTA, _SETQUOTA = 0x800007, 0x800008
_DQBLK = struct.Struct("=QQQQQQQQI4x")  # bhard bsoft curspace ihard isoft curinodes btime itime valid
_QIF_BLIMITS = 1
_BLOCK = 1024  # limits are in blocks of this size; usage is in bytes
_TRIES = 64
_FIRST_ID = 1 << 24  # below are those that people choose, and kubelet's

_quotactl_fd = syscall("quotactl_fd", ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class ProjectUsage:
    """What a project takes, and may take; a limit of 0 is none."""

    used_bytes: int
    inodes: int
    limit_bytes: int


def bound(directory: int, limit_bytes: int) -> None:
    """Give a directory, and whatever is made in it later, a limit. ENOSPC or EDQUOT is what writers get then.

    Raises OSError, where the file system does not count projects ESRCH or ENOSYS.
    """
    project = _free_project(directory)
    _set_limit(directory, project, limit_bytes)
    join(directory, project)


def join(directory: int, project: int) -> None:
    """Have a directory, and whatever is made in it later, belong to a project. Raises OSError."""
    flags, extsize, extents, _, cow = _attributes(directory)
    fcntl.ioctl(directory, _FSSETXATTR, _FSXATTR.pack(flags | _PROJINHERIT, extsize, extents, project, cow))


def usage(directory: int) -> ProjectUsage | None:
    """Of the directory's project; None if it has none. Raises OSError."""
    project = project_of(directory)
    return _get(directory, project) if project else None


def release(directory: int) -> None:
    """Take the limit off the directory's project, before the directory itself goes. Nothing to take is no error."""
    if project := project_of(directory):
        _set_limit(directory, project, 0)


def project_of(directory: int) -> int:
    """Its project; 0 if it has none, or its file system knows none."""
    try:
        return _attributes(directory)[3]
    except OSError as e:
        if e.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            return 0
        raise


def _attributes(directory: int) -> tuple[int, int, int, int, int]:
    flags, extsize, extents, project, cow = _FSXATTR.unpack(fcntl.ioctl(directory, _FSGETXATTR, bytes(_FSXATTR.size)))
    return flags, extsize, extents, project, cow


def _free_project(directory: int) -> int:
    for _ in range(_TRIES):
        project = _FIRST_ID + secrets.randbelow((1 << 31) - _FIRST_ID)
        found = _get(directory, project)
        if not (found.used_bytes or found.inodes or found.limit_bytes):
            return project
    raise OSError(errno.EBUSY, "project quota: every number that was drawn is taken")


def _get(directory: int, project: int) -> ProjectUsage:
    buffer = ctypes.create_string_buffer(_DQBLK.size)
    try:
        _call(directory, _GETQUOTA, project, buffer)
    except OSError as e:
        if e.errno != errno.ENOENT:  # xfs: nobody has used that number
            raise
        return ProjectUsage(0, 0, 0)
    hard, _, used, _, _, inodes, *_ = _DQBLK.unpack(buffer.raw)
    return ProjectUsage(used, inodes, hard * _BLOCK)


def _set_limit(directory: int, project: int, limit_bytes: int) -> None:
    hard = -(-limit_bytes // _BLOCK)
    data = _DQBLK.pack(hard, hard, 0, 0, 0, 0, 0, 0, _QIF_BLIMITS)
    _call(directory, _SETQUOTA, project, ctypes.create_string_buffer(data, _DQBLK.size))


def _call(directory: int, command: int, project: int, buffer: "ctypes.Array[ctypes.c_char]") -> None:
    result = _quotactl_fd(directory, command << 8 | _PRJQUOTA, project, ctypes.addressof(buffer))
    check(result, "quotactl_fd", f"/proc/self/fd/{directory}")
