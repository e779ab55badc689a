"""Layers and writable trees as those of overlayfs, stacked by aufs, for kernels that carry it; what hides something is
told in aufs' own form. Directories are as those of overlayfs, below aufs/; `w` stays empty.

noplink   a file with several names that is copied up is one name's alone, as with overlayfs; else the others would
          change too, but only until the tree is mounted again
xino      is not given here: whoever mounts it has the table of inode numbers in a tmpfs (corral.kernel.aufs)
dirperm1  the uppermost directory alone says who may enter

What aufs itself bounds: names have 242 bytes, and times that are set are in whole seconds.

Source: aufs(5).
"""

import gzip
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from corral.images.drivers.overlayfs import Overlayfs
from corral.images.drivers.places import file_system_of, kernel_has
from corral.images.drivers.usage import measure
from corral.images.layers.aufs import clean, kept_for_itself
from corral.images.snapshotter import Apart, Missing, Mount, TreeId, Usage, Work
from corral.kernel.aufs import join_branches
from corral.store import failpoint

MIN_BRANCHES = 127
"""The fewest that aufs is built for."""
_REFUSED = ("aufs", "overlay", "ecryptfs", "btrfs", "9p", "nfs", "nfs4", "vfat", "fuse.sshfs")


class Aufs(Overlayfs):
    """See Snapshotter."""

    name = "aufs"

    def __init__(self, root: Path, work: Work) -> None:
        super().__init__(root, work)
        self._built_with = _build_options() if kernel_has("aufs") else ""
        self.max_layers = max_branches(self._built_with) - 1

    def check(self) -> str:
        if not kernel_has("aufs"):
            return "this kernel has no aufs: load it with `modprobe aufs` if it was built for it, or use overlayfs"
        if "CONFIG_AUFS_FS=" in self._built_with and "CONFIG_AUFS_XATTR=y" not in self._built_with:
            return "aufs was built without CONFIG_AUFS_XATTR, so files would lose their capabilities: use overlayfs"
        if any(c in str(self._root) for c in ":,=\\\n"):
            return f"aufs takes no ':', ',' or '=' in paths, and {str(self._root)!r} has one: choose another root"
        if (kind := file_system_of(self._root)) in _REFUSED:
            return f"aufs takes no writable branch on the file system of {self._root}, {kind}: choose another root"
        return ""

    def build(self, tree: TreeId, chain: Sequence[TreeId], missing: Missing) -> int:
        below = [str(self._where(layer)) for layer in chain]
        job = {"op": "complete_aufs", "layer": str(self._tmp / str(tree)), "below": below}
        added: int = self._work({**job, "implicit": missing.implicit, "links": missing.links})["size_bytes"]
        failpoint("images.aufs.after_build")
        return added

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> list[Mount]:
        [mount] = super().mounts(tree, chain, writable=writable, quota_bytes=quota_bytes)
        if mount.type == "bind" and not writable:  # a single layer hides nothing
            return [mount]
        told = dict(option.partition("=")[::2] for option in mount.options)
        upper = [told.get("upperdir", mount.source)] if writable else []
        lower = filter(None, told.get("lowerdir", "").split(":"))
        branches = join_branches([*((path, "rw") for path in upper), *((path, "ro+wh") for path in lower)])
        options = (f"br={branches}", "rw" if writable else "ro", "dirperm1", "noplink")
        return [Mount("aufs", "aufs", options, parts=mount.parts)]

    def apart(self, tree: TreeId, chain: Sequence[TreeId]) -> Apart:
        return replace(super().apart(tree, chain), marks="aufs")

    def _measure(self, upper: Path) -> Usage:
        found, kept = measure(upper), list(kept_for_itself(upper))
        size_bytes = sum(status.st_blocks for status in kept) * 512
        return Usage(max(0, found.size_bytes - size_bytes), max(0, found.inodes - len(kept)))

    def _finish(self, upper: Path) -> None:
        clean(upper)
        failpoint("images.aufs.after_cleaning")


def max_branches(built_with: str) -> int:
    """How many branches a mount may have, given lines of a kernel's .config."""
    found = re.search(r"CONFIG_AUFS_BRANCH_MAX_(\d+)=y", built_with)
    return int(found[1]) if found else MIN_BRANCHES


def _build_options() -> str:
    """How aufs was built: told by its module, or by a kernel that has it built in; empty if nobody tells."""
    with suppress(OSError):
        return Path("/sys/fs/aufs/config").read_text()
    with suppress(OSError), gzip.open("/proc/config.gz", "rt") as config:
        return config.read()
    with suppress(OSError):
        return Path(f"/boot/config-{os.uname().release}").read_text()
    return ""
