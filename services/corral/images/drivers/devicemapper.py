"""Every tree a device of a thin pool, with a file system of its own: a layer's is a copy of the one below, with the
layer laid upon it, and a writable tree's a copy of the uppermost layer's. Blocks are shared until they are written.

    devicemapper/data, metadata    what the pool lies on, where no devices are configured for that
    devicemapper/pool              its identity
    devicemapper/e/empty/          an empty file system, for trees that lie on nothing
    devicemapper/tmp/<tree>        being unpacked: a directory
    devicemapper/b/<tree>/         being built
    devicemapper/l/<tree>/         a layer
    devicemapper/s/<tree>/         a writable tree; `made` is as old as the copy
        thin                       the number of the tree's device in the pool, written before there is one
        device                     a node of it, from the time that it was first used since the machine's start
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.images.drivers.places import new_directory, numbered, takes_devices
from corral.images.drivers.thin_pool import MAX_NUMBER, ThinPool
from corral.images.drivers.usage import measure
from corral.images.layers import devices
from corral.images.layers.devices import OPTIONS, SPARE_BYTES, TREE, tree_in
from corral.images.layers.removal import GoOn, always, remove_tree
from corral.images.snapshotter import Apart, Form, Missing, Mount, TreeId, Usage, Work
from corral.kernel import device_mapper
from corral.kernel.syncfs import syncfs
from corral.store import failpoint
from corral.store.bounded import make_file_system, why_no_image
from corral.store.files import atomic_write, fsync_directory

_NUMBER, _NODE, _MADE = "thin", "device", "made"


class Devicemapper:
    """See Snapshotter."""

    name = "devicemapper"
    form: Form = "directory"
    max_layers = 10_000

    def __init__(self, root: Path, work: Work, *, data: Path | None = None, metadata: Path | None = None) -> None:
        """data, metadata: block devices, or files, for the pool; else files are made."""
        self._work = work
        self._root, self._tmp, self._building = root, root / "tmp", root / "b"
        self._layers, self._active, self._empty = root / "l", root / "s", root / "e"
        self._pool = ThinPool(root, data, metadata)
        self._lock, self._lock_of_empty = threading.Lock(), threading.Lock()
        self._numbers: set[int] = set()

    def check(self) -> str:
        if reason := device_mapper.why_none("thin-pool"):
            return f"{reason}, or it is to be loaded by `modprobe dm_thin_pool`; blockfile bounds every tree too"
        if not takes_devices(self._root):
            return f"the file system of {self._root} is mounted with nodev: choose another root"
        return why_no_image()

    def open(self) -> None:
        for path in (self._root, self._tmp, self._building, self._layers, self._active, self._empty):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._root.glob(f"*/*/{_NUMBER}"):
            self._numbers.add(_number(path.parent))

    def close(self) -> None:
        self._pool.close([*map(str, set(self.trees())), "empty", "new"])

    def _nothing(self) -> Path:
        """What trees that lie on nothing are copies of. Made once, since a file system takes long to make."""
        base, new = self._empty / "empty", self._empty / "new"
        with self._lock_of_empty:
            if not base.is_dir():
                self._remove(new)
                self._new(new, None)
                failpoint("images.devicemapper.after_device")
                make_file_system(self._node(new), SPARE_BYTES + SPARE_BYTES // 4)
                with devices.mounted(self._node(new)) as root:
                    new_directory(tree_in(root))
                    syncfs(root)
                self._pool.deactivate(new.name)
                new.rename(base)
                fsync_directory(self._empty)
        return base

    def stage(self, tree: TreeId) -> Path:
        return new_directory(self._tmp / str(tree))

    def build(self, tree: TreeId, chain: Sequence[TreeId], missing: Missing) -> int:
        staged, base = self._tmp / str(tree), self._building / str(tree)
        self._new(base, self._where(chain[0]) if chain else self._nothing())
        failpoint("images.devicemapper.after_build_snapshot")
        job = {"op": "fill", "device": str(self._node(base)), "staged": str(staged)}
        added: int = self._work({**job, "implicit": missing.implicit, "links": missing.links})["size_bytes"]
        self._pool.deactivate(base.name)
        new_directory(staged)
        failpoint("images.devicemapper.after_build")
        return added

    def _where(self, layer: TreeId) -> Path:
        committed = self._layers / str(layer)
        return committed if committed.is_dir() else self._building / str(layer)

    def _new(self, base: Path, origin: Path | None) -> None:
        """A device for a tree: a copy of another's, or one on which nothing is."""
        self._pool.check_room()
        base.mkdir(mode=0o700)
        number = self._free_number()
        atomic_write(base / _NUMBER, b"%d" % number)
        fsync_directory(base.parent)
        failpoint("images.devicemapper.after_number")
        self._pool.create(number, of=None if origin is None else _number(origin))

    def _free_number(self) -> int:
        with self._lock:
            number = next(number for number in range(MAX_NUMBER + 1) if number not in self._numbers)
            self._numbers.add(number)
        return number

    def _node(self, base: Path, *, read_only: bool = False) -> Path:
        node = base / _NODE
        self._pool.activate(_number(base), base.name, node, read_only=read_only)
        return node

    def is_layer(self, tree: TreeId) -> bool:
        return (self._layers / str(tree)).is_dir()

    def commit(self, trees: Sequence[TreeId]) -> None:
        for tree in trees:
            (self._building / str(tree)).rename(self._layers / str(tree))
            failpoint("images.devicemapper.after_commit_of_one")
            remove_tree(self._tmp / str(tree))
        fsync_directory(self._layers)

    def check_quota(self) -> str:
        return ""

    def make_ready(self, tree: TreeId) -> None:
        """There is nothing to do ahead."""

    def is_quick(self, chain: Sequence[TreeId], *, writable: bool) -> bool:
        return bool(chain) and not writable

    def prepare(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> None:
        if chain and not writable:
            return
        base = self._active / str(tree)
        self._new(base, self._layers / str(chain[0]) if chain else self._nothing())
        failpoint("images.devicemapper.after_snapshot")
        if quota_bytes:
            devices.bound(self._node(base), quota_bytes)
            failpoint("images.devicemapper.after_quota")
        (base / _MADE).touch()

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> list[Mount]:
        is_shared = bool(chain) and not writable
        base = self._layers / str(chain[0]) if is_shared else self._active / str(tree)
        node = self._node(base, read_only=is_shared) if base.is_dir() else base / _NODE
        part = Mount("ext4", str(node), ("ro",) if is_shared else OPTIONS)
        return [Mount("bind", f"@0/{TREE}", ("bind", "rw" if writable else "ro"), parts=(part,))]

    def apart(self, tree: TreeId, chain: Sequence[TreeId]) -> Apart:
        base = self._active / str(tree)
        node = str(self._node(base))
        if not chain:
            return Apart(TREE, file=node)
        below = self._node(self._layers / str(chain[0]), read_only=True)
        return Apart(TREE, (str(below),), file=node, since_ns=(base / _MADE).stat().st_ctime_ns)

    def adopt(self, tree: TreeId) -> None:
        base, layer = self._active / str(tree), self._layers / str(tree)
        if not layer.is_dir():
            devices.release(self._node(base))
            self._pool.deactivate(base.name)  # whoever is still using it would write to what others are copies of
            base.rename(layer)
            failpoint("images.devicemapper.after_adoption")
        fsync_directory(self._layers)

    def usage(self, tree: TreeId) -> Usage:
        base = self._active / str(tree)
        try:
            made = (base / _MADE).stat().st_ctime_ns
        except FileNotFoundError:  # a view of layers
            return Usage(0, 0)
        with devices.mounted(self._node(base)) as root:
            return measure(tree_in(root), since_ns=made)

    def remove(self, tree: TreeId, *, go_on: GoOn = always) -> None:
        for above in (self._active, self._building, self._layers):
            self._remove(above / str(tree))
        remove_tree(self._tmp / str(tree), go_on=go_on)

    def _remove(self, base: Path) -> None:
        if not (base / _NUMBER).exists():
            remove_tree(base)
            return
        number = _number(base)
        self._pool.delete(number, base.name)
        failpoint("images.devicemapper.after_delete")
        remove_tree(base)
        fsync_directory(base.parent)
        self._numbers.discard(number)

    def trees(self) -> Iterator[TreeId]:
        yield from map(TreeId, numbered(self._active, self._building, self._tmp, self._layers))


def _number(base: Path) -> int:
    return int((base / _NUMBER).read_text("ascii"))
