"""Mounts that have no place yet: copies of what the host has, and new file systems. The caller closes their fds."""

import errno
from collections.abc import Callable

from corral.kernel import aufs, mount, overlay
from corral.kernel.mount import MNT_DETACH, MOUNT_ATTR__ATIME, MOUNT_ATTR_IDMAP
from corral.kernel.syscalls import AT_FDCWD
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.mount_options import Attributes
from corral.oci.stage import IdMap, Stage


def clone(source: str, destination: str, *, recursive: bool) -> int:
    """A detached copy of a mount of the host, for destination."""
    try:
        return mount.clone_tree(AT_FDCWD, source, recursive=recursive)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            raise ExecFailed(SETUP, f"mount {destination}: the source {source} does not exist") from e
        if e.errno == errno.EINVAL and not recursive:
            reason = "other mounts below it may not be taken off by this user, so it takes rbind"
            raise ExecFailed(SETUP, f"mount {destination}: the source {source}: {reason}") from e
        raise


def part_of[T](tree: int, copy: Callable[[], T], scratch: str, *, what: str) -> T:
    """What `copy` takes from a tree, one file of it say, by mount.clone_tree(); for who mounts `what`.

    Before Linux 6.15 only what has a place can be copied: it gets one for a moment, over the root that is being built,
    scratch.
    """
    try:
        return copy()
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    mount.move_mount(tree, AT_FDCWD, scratch, follow=True, what=what, where=scratch)
    try:
        return copy()
    finally:
        mount.umount(scratch or ".", MNT_DETACH)


def map_ids(tree: int, idmap: IdMap, stage: Stage, destination: str) -> None:
    """Make a tree that nobody has seen an id-mapped one."""
    userns = stage.idmaps[idmap]
    try:
        mount.set_attributes(tree, attr_set=MOUNT_ATTR_IDMAP, userns=userns, recursive=idmap.recursive)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EPERM):
            text = f"mount {destination}: its ids can't be mapped ({e.strerror}): its file system or this kernel can't"
            raise ExecFailed(SETUP, text) from e
        raise


def new(fstype: str, source: str, data: tuple[str, ...], attributes: int, scratch: str) -> int:
    """A new file system. scratch: a directory that an overlay may cover for a moment."""
    if fstype == "overlay":
        return overlay.new_overlay(data, attributes=attributes, scratch=scratch)
    if fstype == "aufs":
        return aufs.new_aufs(data, attributes=attributes)
    return mount.new_mount(fstype, source or fstype, data, attributes=attributes)


def dress(tree: int, attributes: Attributes, *, recursive: bool = False) -> None:
    """Give a tree the attributes that were asked for."""
    if attributes:
        atime = attributes.atime
        mount.set_attributes(
            tree,
            attr_set=attributes.set | (atime or 0),
            attr_clr=attributes.clear | (MOUNT_ATTR__ATIME if atime is not None else 0),
            recursive=recursive,
        )
