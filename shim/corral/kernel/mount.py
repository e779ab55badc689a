"""Mounts by file descriptor: the new mount API, and the few calls of the old one that have no successor.

A mount is made detached (`new_mount`, `clone_tree`), dressed (`set_attributes`) and only then put in its place
(`move_mount`), so no path is looked up twice and nothing half-made is ever visible.
Source: mount_setattr(2), open_tree(2), fsopen(2), pivot_root(2).
"""

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Mapping

from corral.kernel.syscalls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_RECURSIVE,
    AT_SYMLINK_NOFOLLOW,
    Path,
    check,
    failure,
    libc,
    syscall,
)

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR__ATIME = 0x70
MOUNT_ATTR_RELATIME = 0x0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x100000
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

MNT_DETACH = 2

_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_SYMLINKS = 0x10
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 0x1, 0x8
_SET_FLAG, _SET_STRING, _SET_PATH, _SET_FD, _CMD_CREATE, _CMD_RECONFIGURE = 0, 1, 3, 5, 6, 7

# fsconfig(2) copies a string value into 256 bytes.
_MAX_VALUE = 255


_ATTR = struct.Struct("=4Q")
"""struct mount_attr: attr_set, attr_clr, propagation, userns_fd."""

_int, _uint, _str, _ptr = ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_void_p
_open_tree = syscall("open_tree", _int, _str, _uint)
_move_mount = syscall("move_mount", _int, _str, _int, _str, _uint)
_mount_setattr = syscall("mount_setattr", _int, _str, _uint, _str, ctypes.c_size_t)
_fsopen = syscall("fsopen", _str, _uint)
_fsconfig = syscall("fsconfig", _int, _uint, _str, _str, _int)
_fsmount = syscall("fsmount", _int, _uint, _uint)
_fspick = syscall("fspick", _int, _str, _uint)
_pivot_root = syscall("pivot_root", _str, _str)
_mount = libc("mount", _str, _str, _str, ctypes.c_ulong, _str)
_umount2 = libc("umount2", _str, _int)


def clone_tree(dirfd: int, path: Path = "", *, recursive: bool = False, follow: bool = True) -> int:
    """A detached copy of the mount at path (of dirfd itself if empty), rooted there: a bind mount without a place."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    flags |= 0 if follow else AT_SYMLINK_NOFOLLOW
    name = os.fsencode(path)
    flags |= 0 if name else AT_EMPTY_PATH
    return check(_open_tree(dirfd, name, flags), "open_tree", path or f"fd {dirfd}")


def move_mount(
    mount: int, target: int, name: Path = "", *, follow: bool = False, what: Path = "", where: Path = ""
) -> None:
    """Put a detached (or attached) mount on what target, an fd, refers to; or on name in that directory.

    A link at the end of name is only followed if asked for: else it is itself what is covered. what and where are for
    the message.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (0 if name else _MOVE_MOUNT_T_EMPTY_PATH)
    flags |= _MOVE_MOUNT_T_SYMLINKS if follow else 0
    check(_move_mount(mount, b"", target, os.fsencode(name), flags), "move_mount", what, where)


def set_attributes(
    mount: int,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    recursive: bool = False,
    userns: int = 0,
    where: Path = "",
) -> None:
    """mount_setattr(2) on the mount that the fd is the root of.

    The atime mode is one field: to set it, attr_clr must hold all of MOUNT_ATTR__ATIME.
    """
    attr = _ATTR.pack(attr_set, attr_clr, propagation, userns)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    check(_mount_setattr(mount, b"", flags, attr, _ATTR.size), "mount_setattr", where or f"fd {mount}")


def set_propagation(path: Path, propagation: int, *, recursive: bool) -> None:
    """Make the mount at path (and those below it) private, slave, shared or unbindable."""
    attr = _ATTR.pack(0, 0, propagation, 0)
    flags = AT_RECURSIVE if recursive else 0
    check(_mount_setattr(AT_FDCWD, os.fsencode(path), flags, attr, _ATTR.size), "mount_setattr", path)


def new_mount(
    fstype: str,
    source: str | None = None,
    options: Iterable[str] = (),
    *,
    attributes: int = 0,
    descriptors: Mapping[str, int] | None = None,
) -> int:
    """A new, detached mount of a file system: an fd of its root.

    options are `key=value` or `flag` as in mount(8) -o; the per-mount ones are attributes (MOUNT_ATTR_*) instead.
    descriptors are options whose value is an fd.
    Raises OSError naming the file system and, where the kernel gave one, its reason.
    """
    context = check(_fsopen(fstype.encode(), _FSOPEN_CLOEXEC), "fsopen", fstype)
    try:
        if source is not None:
            _configure(context, fstype, "source", source)
        for key, fd in (descriptors or {}).items():
            _check_context(_fsconfig(context, _SET_FD, key.encode(), None, fd), context, f"fsconfig {key}", fstype)
        _configure_all(context, fstype, options)
        _check_context(_fsconfig(context, _CMD_CREATE, None, None, 0), context, "fsconfig create", fstype)
        return _check_context(_fsmount(context, _FSMOUNT_CLOEXEC, attributes), context, "fsmount", fstype)
    finally:
        os.close(context)


def reconfigure(tree: int, fstype: str, options: Iterable[str]) -> None:
    """Give the file system of the mount that the fd is the root of more options, as `mount -o remount` does.

    Raises OSError naming the file system and, where the kernel gave one, its reason.
    """
    context = check(_fspick(tree, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH), "fspick", fstype)
    try:
        _configure_all(context, fstype, options)
        _check_context(_fsconfig(context, _CMD_RECONFIGURE, None, None, 0), context, "fsconfig reconfigure", fstype)
    finally:
        os.close(context)


def _configure_all(context: int, fstype: str, options: Iterable[str]) -> None:
    for option in options:
        key, equals, value = option.partition("=")
        _configure(context, fstype, key, value if equals else None)


def _configure(context: int, fstype: str, key: str, value: str | None) -> None:
    if value is None:
        result = _fsconfig(context, _SET_FLAG, key.encode(), None, 0)
    elif len(data := os.fsencode(value)) <= _MAX_VALUE:
        result = _fsconfig(context, _SET_STRING, key.encode(), data, 0)
    elif data.startswith(b"/"):
        # Too long for a value: open it and name the fd, which is short.
        fd = os.open(data, os.O_PATH | os.O_CLOEXEC)
        try:
            result = _fsconfig(context, _SET_STRING, key.encode(), b"/proc/self/fd/%d" % fd, 0)
        finally:
            os.close(fd)
    else:
        raise failure(errno.ENAMETOOLONG, f"mount {fstype}: option {key}", value)
    _check_context(result, context, f"fsconfig {key}={value}" if value is not None else f"fsconfig {key}", fstype)


def _check_context(result: int, context: int, call: str, fstype: str) -> int:
    if result >= 0:
        return result
    code = ctypes.get_errno()
    if reason := _context_log(context):
        call = f"{call}: {reason}"
    raise failure(code, call, fstype)


def _context_log(context: int) -> str:
    """What the kernel noted about a failed fsopen context: one line per message, `e ` in front of errors."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        while len(lines) < 16:
            lines.append(os.read(context, 1024).decode("utf-8", "replace").strip())
    return "; ".join(line[2:] for line in lines if line.startswith("e "))


def mount(source: Path | None, target: Path, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2), for what the new API cannot do."""
    encoded = None if source is None else os.fsencode(source)
    check(
        _mount(encoded, os.fsencode(target), fstype and fstype.encode(), flags, data and os.fsencode(data)),
        f"mount {fstype or ''}".rstrip(),
        source if source is not None else target,
        target if source is not None else None,
    )


def bind(source: Path, target: Path, *, recursive: bool = False) -> None:
    """Bind-mount source on target, in the caller's mount namespace."""
    mount(source, target, None, 0x1000 | (0x4000 if recursive else 0))


def umount(target: Path, flags: int = 0) -> None:
    """umount2(2)."""
    check(_umount2(os.fsencode(target), flags), "umount2", target)


def pivot_root_to(new_root: int) -> None:
    """Make new_root, an fd of a mount's root, the root of this mount namespace, and drop the old one.

    Needs no directory for the old root: it is stacked on the new one, where "." finds it, as pivot_root(2) describes.
    """
    os.fchdir(new_root)
    check(_pivot_root(b".", b"."), "pivot_root", f"fd {new_root}")
    umount(".", MNT_DETACH)
    os.chdir("/")
