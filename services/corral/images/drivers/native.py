"""Trees without a union file system: a writable tree is a copy of everything below it.

    native/tmp/<tree>            being unpacked
    native/l/<tree>              a layer as it was unpacked: what it changes, in the form that overlayfs reads
    native/f/<tree>              a layer that is all there is: what was a writable tree
    native/s/<tree>/fs, made     a writable tree, or a view; `made` is as old as the copy

Layers are laid one upon the other when a tree is made, so an image takes its own size once, however many layers it has.
Where files can share their blocks (btrfs, xfs) a copy of them takes no room.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.images.drivers.completing import complete
from corral.images.drivers.places import new_directory, numbered, sync_file_system
from corral.images.drivers.usage import measure
from corral.images.layers.removal import GoOn, always, remove_tree
from corral.images.snapshotter import Apart, Form, Missing, Mount, TreeId, Usage, Work
from corral.store import failpoint
from corral.store.bounded import bound_project, counts_projects, release_project
from corral.store.files import fsync_directory


class Native:
    """See Snapshotter."""

    name = "native"
    form: Form = "directory"
    max_layers = 10_000

    def __init__(self, root: Path, work: Work) -> None:
        self._work = work
        self._root, self._tmp, self._layers = root, root / "tmp", root / "l"
        self._whole, self._active = root / "f", root / "s"

    def check(self) -> str:
        return ""

    def open(self) -> None:
        for path in (self._root, self._tmp, self._layers, self._whole, self._active):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def close(self) -> None:
        """The kernel holds nothing."""

    def stage(self, tree: TreeId) -> Path:
        return new_directory(self._tmp / str(tree))

    def build(self, tree: TreeId, chain: Sequence[TreeId], missing: Missing) -> int:
        return complete(self._work, self._tmp / str(tree), self._needed(chain), missing)

    def _where(self, tree: TreeId) -> Path:
        for above in (self._layers, self._whole):
            if (path := above / str(tree)).is_dir():
                return path
        return self._tmp / str(tree)

    def is_layer(self, tree: TreeId) -> bool:
        left_by_an_adoption = (self._active / str(tree)).exists()
        return self._where(tree).parent != self._tmp and not left_by_an_adoption

    def commit(self, trees: Sequence[TreeId]) -> None:
        for tree in trees:
            (self._tmp / str(tree)).rename(self._layers / str(tree))
            failpoint("images.native.after_commit_of_one")
        fsync_directory(self._layers)

    def check_quota(self) -> str:
        return "" if counts_projects(self._root) else f"the file system of {self._root} is not mounted with prjquota"

    def make_ready(self, tree: TreeId) -> None:
        """There is nothing to do ahead."""

    def is_quick(self, chain: Sequence[TreeId], *, writable: bool) -> bool:
        return not writable and self._single(chain) is not None

    def prepare(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> None:
        if not writable and self._single(chain) is not None:
            return
        base = self._active / str(tree)
        base.mkdir(mode=0o700)
        if quota_bytes:
            bound_project(base, quota_bytes)
            failpoint("images.native.after_quota")
        root = new_directory(base / "fs")
        failpoint("images.native.before_copy")
        if layers := [str(path) for path in reversed(self._needed(chain))]:
            self._work({"op": "lay", "layers": layers, "target": str(root)})
            failpoint("images.native.after_copy")
        (base / "made").touch()

    def _needed(self, chain: Sequence[TreeId]) -> list[Path]:
        """The layers down to the first one that is all there is."""
        found = []
        for layer in chain:
            found.append(self._where(layer))
            if found[-1].parent == self._whole:
                break
        return found

    def _single(self, chain: Sequence[TreeId]) -> Path | None:
        """The one layer that a view is of."""
        needed = self._needed(chain)
        return needed[0] if len(needed) == 1 else None

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> list[Mount]:
        single = None if writable else self._single(chain)
        source = self._active / str(tree) / "fs" if single is None else single
        return [Mount("bind", str(source), ("bind", "rw" if writable else "ro"))]

    def apart(self, tree: TreeId, chain: Sequence[TreeId]) -> Apart:
        base = self._active / str(tree)
        if not chain:
            return Apart(str(base / "fs"))
        made = (base / "made").stat().st_ctime_ns
        return Apart(str(base / "fs"), tuple(map(str, self._needed(chain))), since_ns=made)

    def adopt(self, tree: TreeId) -> None:
        base, layer = self._active / str(tree), self._whole / str(tree)
        if not layer.is_dir():
            sync_file_system(base)
            release_project(base)
            (base / "fs").rename(layer)
            failpoint("images.native.after_adoption")
        fsync_directory(self._whole)
        remove_tree(base)

    def usage(self, tree: TreeId) -> Usage:
        base = self._active / str(tree)
        try:
            made = (base / "made").stat().st_ctime_ns
        except FileNotFoundError:  # a view of a single layer
            return Usage(0, 0)
        return measure(base / "fs", since_ns=made)

    def remove(self, tree: TreeId, *, go_on: GoOn = always) -> None:
        release_project(self._active / str(tree))
        for above in (self._active, self._tmp, self._layers, self._whole):
            remove_tree(above / str(tree), go_on=go_on)

    def trees(self) -> Iterator[TreeId]:
        yield from map(TreeId, numbered(self._active, self._tmp, self._layers, self._whole))
