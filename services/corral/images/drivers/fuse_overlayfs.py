"""Layers and writable trees as those of overlayfs, stacked by the program fuse-overlayfs: for data that lies where the
kernel's overlayfs takes no upper directory.

The runtime starts one for each container that runs (see corral.kernel.fuse). It belongs to no daemon, and ends with the
container's mount.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from corral.images.drivers.overlayfs import Overlayfs
from corral.images.drivers.places import kernel_has
from corral.images.snapshotter import Mount, TreeId
from corral.store.bounded import counts_projects

PROGRAM = "fuse-overlayfs"
TYPE = "fuse.fuse-overlayfs"


class FuseOverlayfs(Overlayfs):
    """See Snapshotter. Directories are as those of overlayfs, below fuse-overlayfs/."""

    name = "fuse-overlayfs"

    def check(self) -> str:
        if shutil.which(PROGRAM) is None:
            return "there is no program fuse-overlayfs: install the package of that name"
        if not kernel_has("fuse") or not Path("/dev/fuse").exists():
            return "the kernel has no FUSE: load it with `modprobe fuse`"
        if any(c in str(self._root) for c in ":,\\\n"):
            return f"fuse-overlayfs takes no ':' or ',' in paths, and {str(self._root)!r} has one: choose another root"
        return ""

    def check_quota(self) -> str:
        return "" if counts_projects(self._root) else f"the file system of {self._root} is not mounted with prjquota"

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> list[Mount]:
        [mount] = super().mounts(tree, chain, writable=writable, quota_bytes=quota_bytes)
        if mount.type == "bind":
            return [mount]
        options = tuple(option for option in mount.options if option not in self._options)
        served = Mount(TYPE, shutil.which(PROGRAM) or PROGRAM, options)
        return [Mount("bind", "@0", ("bind", "rw" if writable else "ro"), parts=(served,))]
