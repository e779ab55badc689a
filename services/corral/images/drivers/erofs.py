"""Layers as EROFS images, made from the tar as it comes and mounted without being unpacked; overlayfs stacks them.

erofs/tmp/<tree>/image    being written
erofs/i/<tree>            a layer
erofs/l/<tree>            a layer that was a writable tree: a directory
erofs/s, r                writable trees, as those of overlayfs
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.images.drivers.overlayfs import Look, Overlayfs
from corral.images.drivers.places import kernel_has, numbered
from corral.images.layers.erofs import look_of_root
from corral.images.layers.imaging import IMAGE
from corral.images.layers.removal import GoOn, always
from corral.images.snapshotter import Form, Missing, Mount, TreeId, Work
from corral.store import failpoint
from corral.store.files import fsync_directory


class Erofs(Overlayfs):
    """See Snapshotter."""

    name = "erofs"
    form: Form = "image"

    def __init__(self, root: Path, work: Work) -> None:
        super().__init__(root, work)
        self._images = root / "i"

    def check(self) -> str:
        if not kernel_has("erofs"):
            return "the kernel has no erofs: load it with `modprobe erofs`"
        return super().check()

    def open(self) -> None:
        super().open()
        self._images.mkdir(mode=0o700, exist_ok=True)

    def build(self, tree: TreeId, chain: Sequence[TreeId], missing: Missing) -> int:
        if not chain or not missing:
            return 0
        below = [str(self._where(layer)) for layer in chain]
        job = {"op": "complete_image", "directory": str(self._tmp / str(tree)), "below": below}
        added: int = self._work({**job, "implicit": missing.implicit, "links": missing.links})["size_bytes"]
        failpoint("images.erofs.after_build")
        return added

    def _where(self, layer: TreeId) -> Path:
        for path in (self._images / str(layer), self._layers / str(layer)):
            if path.exists():
                return path
        return self._tmp / str(layer) / IMAGE

    def is_layer(self, tree: TreeId) -> bool:
        return (self._images / str(tree)).is_file() or super().is_layer(tree)

    def commit(self, trees: Sequence[TreeId]) -> None:
        for tree in trees:
            (self._tmp / str(tree) / IMAGE).rename(self._images / str(tree))
            failpoint("images.erofs.after_commit_of_one")
            (self._tmp / str(tree)).rmdir()
        fsync_directory(self._images)

    def _read_look(self, layer: TreeId) -> Look:
        path = self._images / str(layer)
        return Look(*look_of_root(str(path))) if path.is_file() else super()._read_look(layer)

    def _stack(self, chain: Sequence[TreeId]) -> tuple[list[str], tuple[Mount, ...]]:
        lower: list[str] = []
        parts: list[Mount] = []
        for layer in chain:
            path = self._where(layer)
            if path.parent == self._images:
                lower.append(f"@{len(parts)}")
                parts.append(Mount("erofs", str(path), ("ro",)))
            else:
                lower.append(str(path))
        return lower, tuple(parts)

    def remove(self, tree: TreeId, *, go_on: GoOn = always) -> None:
        (self._images / str(tree)).unlink(missing_ok=True)
        super().remove(tree, go_on=go_on)

    def trees(self) -> Iterator[TreeId]:
        yield from super().trees()
        yield from map(TreeId, numbered(self._images))
