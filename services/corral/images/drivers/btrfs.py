"""Layers as subvolumes of btrfs, each the whole tree that it ends: a writable tree is a snapshot of one.

    btrfs/tmp/<tree>          being unpacked; then, built, the layer that is to be
    btrfs/b/<tree>            being built
    btrfs/l/<tree>            a layer
    btrfs/s/<tree>/fs, made   a writable tree; `made` is as old as the snapshot

A layer is unpacked on its own, as every driver's is, and then laid on a snapshot of the layer below; blocks are shared.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.images.drivers.completing import complete
from corral.images.drivers.places import file_system_of, numbered, sync_file_system
from corral.images.drivers.usage import measure
from corral.images.layers.removal import GoOn, always, remove_tree
from corral.images.snapshotter import Apart, Form, Missing, Mount, TreeId, Usage, Work
from corral.kernel import btrfs
from corral.store import failpoint
from corral.store.files import fsync_directory

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Btrfs:
    """See Snapshotter."""

    name = "btrfs"
    form: Form = "directory"
    max_layers = 10_000

    def __init__(self, root: Path, work: Work) -> None:
        self._work = work
        self._root, self._tmp, self._building = root, root / "tmp", root / "b"
        self._layers, self._active = root / "l", root / "s"

    def check(self) -> str:
        kind = file_system_of(self._root)
        return "" if kind == "btrfs" else f"{self._root} does not lie on btrfs but on {kind or 'something unknown'}"

    def open(self) -> None:
        for path in (self._root, self._tmp, self._building, self._layers, self._active):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def close(self) -> None:
        """The kernel holds nothing."""

    def stage(self, tree: TreeId) -> Path:
        return _new_subvolume(self._tmp / str(tree))

    def build(self, tree: TreeId, chain: Sequence[TreeId], missing: Missing) -> int:
        if not chain:
            return 0
        staged, built, below = self._tmp / str(tree), self._building / str(tree), self._where(chain[0])
        added = complete(self._work, staged, [below], missing)
        _snapshot(below, built)
        failpoint("images.btrfs.after_build_snapshot")
        self._work({"op": "lay", "layers": [str(staged)], "target": str(built)})
        _destroy(staged)
        failpoint("images.btrfs.after_build")
        built.rename(staged)
        return added

    def _where(self, layer: TreeId) -> Path:
        committed = self._layers / str(layer)
        return committed if committed.is_dir() else self._tmp / str(layer)

    def is_layer(self, tree: TreeId) -> bool:
        left_by_an_adoption = (self._active / str(tree)).exists()
        return (self._layers / str(tree)).is_dir() and not left_by_an_adoption

    def commit(self, trees: Sequence[TreeId]) -> None:
        for tree in trees:
            (self._tmp / str(tree)).rename(self._layers / str(tree))
            failpoint("images.btrfs.after_commit_of_one")
        fsync_directory(self._layers)

    def check_quota(self) -> str:
        with _opened(self._root) as fd:
            if btrfs.counts_simply(fd):
                return ""
        return (
            f"the file system of {self._root} has no simple quotas, the only ones that a container cannot leave by"
            f" making subvolumes: turn them on with `btrfs quota enable --simple {self._root}`"
        )

    def make_ready(self, tree: TreeId) -> None:
        """There is nothing to do ahead."""

    def is_quick(self, chain: Sequence[TreeId], *, writable: bool) -> bool:
        return bool(chain) and not writable

    def prepare(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> None:
        if chain and not writable:
            return
        base = self._active / str(tree)
        base.mkdir(mode=0o700)
        if chain:
            _snapshot(self._layers / str(chain[0]), base / "fs")
        else:
            _new_subvolume(base / "fs")
        failpoint("images.btrfs.after_snapshot")
        if quota_bytes:
            with _opened(base / "fs") as fd, _opened(base) as above:
                btrfs.limit(fd, quota_bytes, outside=above)
            failpoint("images.btrfs.after_quota")
        (base / "made").touch()

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> list[Mount]:
        if chain and not writable:
            return [Mount("bind", str(self._layers / str(chain[0])), ("bind", "ro"))]
        return [Mount("bind", str(self._active / str(tree) / "fs"), ("bind", "rw" if writable else "ro"))]

    def apart(self, tree: TreeId, chain: Sequence[TreeId]) -> Apart:
        base = self._active / str(tree)
        if not chain:
            return Apart(str(base / "fs"))
        made = (base / "made").stat().st_ctime_ns
        return Apart(str(base / "fs"), (str(self._layers / str(chain[0])),), since_ns=made)

    def adopt(self, tree: TreeId) -> None:
        base, layer = self._active / str(tree), self._layers / str(tree)
        if not layer.is_dir():
            sync_file_system(base)
            with _opened(base / "fs") as fd, _opened(base) as above:
                btrfs.lift_limit(fd, outside=above)
            (base / "fs").rename(layer)
            failpoint("images.btrfs.after_adoption")
        fsync_directory(self._layers)
        remove_tree(base)

    def usage(self, tree: TreeId) -> Usage:
        base = self._active / str(tree)
        try:
            made = (base / "made").stat().st_ctime_ns
        except FileNotFoundError:  # a view of layers
            return Usage(0, 0)
        return measure(base / "fs", since_ns=made)

    def remove(self, tree: TreeId, *, go_on: GoOn = always) -> None:
        base = self._active / str(tree)
        with contextlib.suppress(FileNotFoundError), _opened(base / "fs") as fd, _opened(base) as above:
            btrfs.lift_limit(fd, outside=above)
        for path in (self._active / str(tree) / "fs", *(self._root / above / str(tree) for above in ("b", "tmp", "l"))):
            _destroy(path, go_on=go_on)
        remove_tree(self._active / str(tree), go_on=go_on)

    def trees(self) -> Iterator[TreeId]:
        yield from map(TreeId, numbered(self._active, self._building, self._tmp, self._layers))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, _DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _new_subvolume(path: Path) -> Path:
    with _opened(path.parent) as above:
        btrfs.create_subvolume(above, path.name)
    path.chmod(0o755)  # the image's root, where no entry says otherwise
    return path


def _snapshot(source: Path, target: Path) -> None:
    with _opened(source) as tree, _opened(target.parent) as above:
        btrfs.snapshot(tree, above, target.name)


def _destroy(path: Path, *, go_on: GoOn = always) -> None:
    """Remove a subvolume; nothing there is no error. A container may have made subvolumes of its own in it."""
    try:
        with _opened(path.parent) as above:
            btrfs.destroy_subvolume(above, path.name)
    except FileNotFoundError:
        return
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EINVAL):
            raise
        remove_tree(path, go_on=go_on)
