"""Layers as those of overlayfs, and every writable tree in a file: a file system of its own, of a size of its own.

So no container can take more than its share of disk or inodes, whatever the file system below counts. Directories are
as those of overlayfs, below blockfile/.
"""

from collections.abc import Sequence

from corral.images.drivers.overlayfs import Overlayfs
from corral.images.snapshotter import Mount, TreeId
from corral.store import failpoint
from corral.store.bounded import make_image, why_no_image

DEFAULT_BYTES = 10 << 30
"""Of a tree for which nobody asked a quota. The file takes only what is used."""


class Blockfile(Overlayfs):
    """See Snapshotter."""

    name = "blockfile"

    def check(self) -> str:
        return why_no_image() or super().check()

    def check_quota(self) -> str:
        return ""

    def is_quick(self, chain: Sequence[TreeId], *, writable: bool) -> bool:
        return not writable and super().is_quick(chain, writable=False)

    def prepare(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> None:
        super().prepare(tree, chain, writable=writable, quota_bytes=quota_bytes or DEFAULT_BYTES * writable)

    def _bound(self, tree: TreeId, quota_bytes: int) -> None:
        make_image(self._bounded / str(tree), quota_bytes, self._active / str(tree))
        failpoint("images.blockfile.after_image")

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> list[Mount]:
        return super().mounts(tree, chain, writable=writable, quota_bytes=quota_bytes or DEFAULT_BYTES * writable)
