"""Layers stacked by the kernel's overlayfs.

    overlay/tmp/<tree>      being unpacked
    overlay/l/<tree>        a layer; this short name is its path in lowerdir=, so that hundreds fit
    overlay/s/<tree>/u, w   an active tree's upper and work directory

Source: Documentation/filesystems/overlayfs.rst.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.images.layers.removal import GoOn, always, remove_tree
from corral.images.snapshotter import Mount, TreeId, Usage
from corral.kernel.syncfs import syncfs
from corral.store.files import fsync_directory

# Defaults that a kernel may be built with and that would tie an upper directory to its first lower ones.
_OFF_BY_PARAMETER = {"index": "index=off", "metacopy": "metacopy=off"}
_PARAMETERS = Path("/sys/module/overlay/parameters")


class Overlayfs:
    """See Snapshotter. Layers are independent of each other until they are mounted."""

    name = "overlayfs"
    max_layers = 500  # OVL_MAX_STACK

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tmp, self._layers, self._active = root / "tmp", root / "l", root / "s"
        self._options = tuple(option for name, option in _OFF_BY_PARAMETER.items() if (_PARAMETERS / name).exists())

    def check(self) -> str:
        if "\toverlay\n" not in Path("/proc/filesystems").read_text():
            return "the kernel has no overlayfs: load it with `modprobe overlay`"
        if any(c in str(self._root) for c in ":,\\\n"):
            return f"overlayfs takes no ':', ',' or '\\' in paths, and {str(self._root)!r} has one: choose another root"
        if _filesystem_of(self._root) in ("overlay", "9p", "nfs", "nfs4", "vfat", "fuse.sshfs"):
            return f"overlayfs takes no upper directory on the file system of {self._root}: choose another root"
        return ""

    def open(self) -> None:
        for path in (self._root, self._tmp, self._layers, self._active):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stage(self, tree: TreeId) -> Path:
        path = self._tmp / str(tree)
        path.mkdir()
        path.chmod(0o755)  # the image's root, where no entry says otherwise
        return path

    def layer(self, tree: TreeId) -> Path:
        return self._layers / str(tree)

    def is_layer(self, tree: TreeId) -> bool:
        return self.layer(tree).is_dir()

    def commit(self, trees: Sequence[TreeId]) -> None:
        for tree in trees:
            (self._tmp / str(tree)).rename(self._layers / str(tree))
        fsync_directory(self._layers)

    def prepare(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool) -> None:
        if chain and not writable:
            return
        base = self._active / str(tree)
        base.mkdir(0o700)
        upper = base / "u"
        upper.mkdir()
        if not chain:
            upper.chmod(0o755)
            return
        (base / "w").mkdir(0o700)
        # The root of the merged tree is the upper directory, so it has to look as the root below it does.
        below = self.layer(chain[0]).stat()
        if below.st_uid or below.st_gid:
            os.chown(upper, below.st_uid, below.st_gid)
        upper.chmod(stat.S_IMODE(below.st_mode))

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool) -> list[Mount]:
        if not chain:
            return [Mount("bind", f"{self._active}/{tree}/u", ("bind", "rw" if writable else "ro"))]
        if len(chain) == 1 and not writable:
            return [Mount("bind", f"{self._layers}/{chain[0]}", ("bind", "ro"))]
        lower = "lowerdir=" + ":".join(f"{self._layers}/{layer}" for layer in chain)
        if not writable:
            return [Mount("overlay", "overlay", ("ro", lower, *self._options))]
        base = f"{self._active}/{tree}"
        return [Mount("overlay", "overlay", (lower, f"upperdir={base}/u", f"workdir={base}/w", *self._options))]

    def adopt(self, tree: TreeId) -> None:
        upper = self._active / str(tree) / "u"
        fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syncfs(fd)
        finally:
            os.close(fd)
        upper.rename(self._layers / str(tree))
        fsync_directory(self._layers)
        remove_tree(self._active / str(tree))

    def usage(self, tree: TreeId) -> Usage:
        return _usage(self._active / str(tree) / "u")

    def remove(self, tree: TreeId, *, go_on: GoOn = always) -> None:
        for above in (self._active, self._tmp, self._layers):
            remove_tree(above / str(tree), go_on=go_on)

    def trees(self) -> Iterator[TreeId]:
        for above in (self._active, self._tmp, self._layers):
            for path in above.iterdir():
                if path.name.isdigit():
                    yield TreeId(int(path.name))


def _filesystem_of(path: Path) -> str:
    """The type of the file system that `path`, or what exists of it, lies on."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == wanted:
                return rest.split()[0]
    return ""


def _usage(path: Path) -> Usage:
    """A file with several names counts once."""
    size = inodes = 0
    seen: set[int] = set()
    for directory, names, files, fd in os.fwalk(path, follow_symlinks=False):
        del directory
        for name in (*names, *files):
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if status.st_ino in seen:
                continue
            if status.st_nlink > 1:
                seen.add(status.st_ino)
            size += status.st_blocks * 512
            inodes += 1
    return Usage(size, inodes)
