"""Images mounted on directories of the host, for somebody to look into or to write to.

Each has a snapshot of its own, which says in its labels where it is mounted, and how many mounts there were already: so
whoever comes after a crash knows it, and can undo the half of it. Nothing else that is mounted there is ever touched.
"""

import errno
import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from corral.images.errors import explained
from corral.images.snapshots import Snapshots, Wanted
from corral.images.snapshotter import Mount
from corral.images.trees import Kind, TreeRecord
from corral.kernel import mount as kernel
from corral.kernel.syscalls import AT_FDCWD
from corral.oci.parts import attach, located, located_options, make_parts
from corral.oci.spec import Mount as Described
from corral.oci.trees import new
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from corral.store import failpoint

DIRECTORY, BEFORE = "corral.mount", "corral.mount.before"
_ACCESS = frozenset(("ro", "rw", "bind"))
_NO_FOLLOW = 8  # UMOUNT_NOFOLLOW of umount2(2)


class HostMounts:
    """See the module."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    async def mount(self, namespace: str, image: str, directory: str, *, writable: bool) -> TreeRecord:
        """Raises NotFound, AlreadyExists, InvalidArgument, FailedPrecondition."""
        where = await run_blocking(_checked, directory)
        key = _key(where)
        if self._find(namespace, key) is not None:
            raise AlreadyExists(
                f"an image is mounted on {where} already: `corral image unmount {where}` first", reason="MOUNTED"
            )
        labels = {DIRECTORY: where, BEFORE: str(await run_blocking(_count, where))}
        kind = Kind.ACTIVE if writable else Kind.VIEW
        made = await self._snapshots.prepare(Wanted(namespace, key, kind, image=image, labels=labels))
        try:
            _check_server(made.mounts, made.record.driver)
            failpoint("images.mount.after_snapshot")
            await run_blocking(_mount, made.mounts, where)
            failpoint("images.mount.after_mount")
        except BaseException as e:
            await self._undo(made.record)
            if isinstance(e, OSError):
                raise explained(e, f"cannot mount image {image!r} on {where}") from e
            raise
        return made.record

    async def unmount(self, namespace: str, directory: str) -> None:
        """Raises NotFound, FailedPrecondition while it is in use."""
        where = await run_blocking(os.path.realpath, directory)
        record = self._find(namespace, _key(where))
        if record is None:
            raise NotFound(
                f"no image is mounted on {where}: `corral image mount` lists where some are", reason="NOT_MOUNTED"
            )
        await self._undo(record)

    async def _undo(self, record: TreeRecord) -> None:
        where = record.labels[DIRECTORY]
        try:
            await run_blocking(_unmount, where, int(record.labels[BEFORE]))
        except OSError as e:
            if e.errno == errno.EBUSY:
                raise FailedPrecondition(
                    f"the image on {where} is in use: end what works in it, and try again", reason="IN_USE"
                ) from e
            raise explained(e, f"cannot unmount {where}") from e
        failpoint("images.unmount.after_unmount")
        await self._snapshots.remove(record.namespace, record.key, must_exist=False)

    def _find(self, namespace: str, key: str) -> TreeRecord | None:
        try:
            return self._snapshots.get(namespace, key)
        except NotFound:
            return None


def _checked(directory: str) -> str:
    if not directory.startswith("/"):
        raise InvalidArgument(f"{directory[:200]!r} is not an absolute path", reason="BAD_DIRECTORY")
    where = os.path.realpath(directory)
    if where == "/" or not Path(where).is_dir():
        raise InvalidArgument(f"{where} is no directory to mount an image on: make one first", reason="BAD_DIRECTORY")
    return where


def _key(where: str) -> str:
    return f"mount-{hashlib.sha256(os.fsencode(where)).hexdigest()[:24]}"


def _check_server(mounts: Sequence[Mount], driver: str) -> None:
    if any(part.type.startswith("fuse") for mount in mounts for part in mount.parts):
        raise FailedPrecondition(
            f"snapshot driver {driver} needs a program for every mount, which would end with the daemon:"
            " run a container of the image instead",
            reason="NEEDS_SERVER",
        )


def _count(where: str) -> int:
    """How many mounts there are on a directory, one upon the other."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        return sum(_unescaped(line.split(" ", 5)[4]) == where for line in mounts)


def _unescaped(path: str) -> str:
    """Source: proc_pid_mountinfo(5): blanks, tabs, newlines and backslashes are octal."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(octal, character)
    return path


def _mount(mounts: Sequence[Mount], where: str) -> None:
    [wanted] = mounts
    with ExitStack() as stack:
        parts = make_parts([Described("", part.type, part.source, part.options) for part in wanted.parts], stack)
        attach(parts, where)
        attributes = kernel.MOUNT_ATTR_RDONLY if "ro" in wanted.options else 0
        attributes |= kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOSUID
        if wanted.type == "bind":
            tree = kernel.clone_tree(AT_FDCWD, located(wanted.source, parts))
            stack.callback(os.close, tree)
            kernel.set_attributes(tree, attr_set=attributes)
        else:
            options = [option for option in wanted.options if option not in _ACCESS]
            tree = new(wanted.type, wanted.source, located_options(options, parts), attributes, where)
            stack.callback(os.close, tree)
        target = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, target)
        kernel.move_mount(tree, target)


def _unmount(where: str, before: int) -> None:
    while _count(where) > before:
        kernel.umount(Path(where), _NO_FOLLOW)
