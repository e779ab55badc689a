"""Layers stacked by the kernel's overlayfs.

    overlay/tmp/<tree>      being unpacked
    overlay/l/<tree>        a layer; this short name is its path in lowerdir=, so that hundreds fit
    overlay/s/<tree>/u, w   an active tree's upper and work directory
    overlay/r/<tree>/u, w   likewise, made before anybody asked for it
    overlay/b/<tree>        a file system with these two, of an active tree that is bounded by that

Source: Documentation/filesystems/overlayfs.rst.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.images.drivers.completing import complete
from corral.images.drivers.places import file_system_of, kernel_has, new_directory, numbered, sync_file_system
from corral.images.drivers.usage import measure
from corral.images.layers.removal import GoOn, always, remove_tree
from corral.images.snapshotter import Apart, Form, Missing, Mount, TreeId, Usage, Work
from corral.store import failpoint
from corral.store.bounded import (
    IMAGE_OPTIONS,
    IMAGE_TYPE,
    bound_project,
    counts_projects,
    image_usage,
    make_image,
    project_usage,
    release_project,
    why_no_image,
)
from corral.store.files import fsync_directory

# Defaults that a kernel may be built with and that would tie an upper directory to its first lower ones.
_OFF_BY_PARAMETER = {"index": "index=off", "metacopy": "metacopy=off"}
_PARAMETERS = Path("/sys/module/overlay/parameters")


@dataclass(frozen=True, slots=True)
class Look:
    """Of a directory."""

    mode: int
    uid: int
    gid: int


_PLAIN = Look(0o755, 0, 0)


class Overlayfs:
    """See Snapshotter. Layers are independent of each other until they are mounted."""

    name = "overlayfs"
    form: Form = "directory"
    max_layers = 500  # OVL_MAX_STACK

    def __init__(self, root: Path, work: Work) -> None:
        self._work = work
        self._root = root
        self._tmp, self._layers, self._active, self._ready = root / "tmp", root / "l", root / "s", root / "r"
        self._bounded = root / "b"
        self._counts_projects = counts_projects(root)
        self._looks: dict[TreeId, Look] = {}  # of layers, which do not change
        self._options = tuple(option for name, option in _OFF_BY_PARAMETER.items() if (_PARAMETERS / name).exists())

    def check(self) -> str:
        if not kernel_has("overlay"):
            return "the kernel has no overlayfs: load it with `modprobe overlay`"
        if any(c in str(self._root) for c in ":,\\\n"):
            return f"overlayfs takes no ':', ',' or '\\' in paths, and {str(self._root)!r} has one: choose another root"
        if file_system_of(self._root) in ("overlay", "9p", "nfs", "nfs4", "vfat", "fuse.sshfs"):
            return f"overlayfs takes no upper directory on the file system of {self._root}: choose another root"
        return ""

    def open(self) -> None:
        for path in (self._root, self._tmp, self._layers, self._active, self._ready, self._bounded):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def close(self) -> None:
        """The kernel holds nothing."""

    def stage(self, tree: TreeId) -> Path:
        return new_directory(self._tmp / str(tree))

    def build(self, tree: TreeId, chain: Sequence[TreeId], missing: Missing) -> int:
        return complete(self._work, self._tmp / str(tree), [self._where(layer) for layer in chain], missing)

    def _where(self, layer: TreeId) -> Path:
        committed = self._layers / str(layer)
        return committed if committed.is_dir() else self._tmp / str(layer)

    def is_layer(self, tree: TreeId) -> bool:
        left = (self._active / str(tree), self._bounded / str(tree))  # by an adoption that was interrupted
        return (self._layers / str(tree)).is_dir() and not any(path.exists() for path in left)

    def commit(self, trees: Sequence[TreeId]) -> None:
        for tree in trees:
            (self._tmp / str(tree)).rename(self._layers / str(tree))
        fsync_directory(self._layers)

    def prepare(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> None:
        if chain and not writable:
            return
        base = f"{self._active}/{tree}"
        try:
            os.rename(f"{self._ready}/{tree}", base)  # noqa: PTH104 - a string
        except FileNotFoundError:
            _make(base)
        # The root of the merged tree is the upper directory, so it has to look as the root below it does.
        look = self._look(chain[0]) if chain else _PLAIN
        if look != _PLAIN:
            os.chown(f"{base}/u", look.uid, look.gid)
            os.chmod(f"{base}/u", look.mode)  # noqa: PTH101 - a string
        if quota_bytes:
            self._bound(tree, quota_bytes)

    def _bound(self, tree: TreeId, quota_bytes: int) -> None:
        base = self._active / str(tree)
        if self._counts_projects:
            bound_project(base, quota_bytes, holding=("u", "w"))
        else:
            make_image(self._bounded / str(tree), quota_bytes, base)
        failpoint("images.overlayfs.after_quota")

    def check_quota(self) -> str:
        if self._counts_projects:
            return ""
        reason = why_no_image()
        return reason and f"the file system of {self._root} is not mounted with prjquota, and {reason}"

    def make_ready(self, tree: TreeId) -> None:
        _make(f"{self._ready}/{tree}")

    def is_quick(self, chain: Sequence[TreeId], *, writable: bool) -> bool:
        return chain[0] in self._looks if chain and writable else bool(chain) or writable

    def _look(self, layer: TreeId) -> Look:
        look = self._looks.get(layer)
        if look is None:
            look = self._looks[layer] = self._read_look(layer)
        return look

    def _read_look(self, layer: TreeId) -> Look:
        status = (self._layers / str(layer)).stat()
        return Look(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)

    def mounts(self, tree: TreeId, chain: Sequence[TreeId], *, writable: bool, quota_bytes: int = 0) -> list[Mount]:
        base, file = f"{self._active}/{tree}", f"{self._bounded}/{tree}"
        layers, parts = self._stack(chain)
        if quota_bytes and os.path.exists(file):  # noqa: PTH110 - a string
            base = f"@{len(parts)}"
            parts += (Mount(IMAGE_TYPE, file, IMAGE_OPTIONS),)
        if not layers:
            return [Mount("bind", f"{base}/u", ("bind", "rw" if writable else "ro"), parts=parts)]
        if len(layers) == 1 and not writable:
            return [Mount("bind", layers[0], ("bind", "ro"), parts=parts)]
        access = (f"upperdir={base}/u", f"workdir={base}/w") if writable else ("ro",)
        return [Mount("overlay", "overlay", (f"lowerdir={':'.join(layers)}", *access, *self._options), parts=parts)]

    def _stack(self, chain: Sequence[TreeId]) -> tuple[list[str], tuple[Mount, ...]]:
        """The layers as lowerdir= names them, and what has to be mounted for that."""
        return [f"{self._layers}/{layer}" for layer in chain], ()

    def apart(self, tree: TreeId, chain: Sequence[TreeId]) -> Apart:
        file = self._bounded / str(tree)
        layers, parts = self._stack(chain)
        below = tuple(parts[int(path[1:])].source if path.startswith("@") else path for path in layers)
        if file.exists():
            return Apart("u", below, file=str(file))
        return Apart(str(self._active / str(tree) / "u"), below)

    def adopt(self, tree: TreeId) -> None:
        base, file, layer = (above / str(tree) for above in (self._active, self._bounded, self._layers))
        if not layer.is_dir():
            upper = self._take_out(tree, file) if file.exists() else base / "u"
            self._finish(upper)
            sync_file_system(upper)
            release_project(base)
            upper.rename(layer)
            failpoint("images.overlayfs.after_adoption")
        fsync_directory(self._layers)
        remove_tree(base)
        file.unlink(missing_ok=True)

    def _finish(self, upper: Path) -> None:
        """Make a layer of what was written to: it is one."""

    def _take_out(self, tree: TreeId, file: Path) -> Path:
        """A copy of the upper directory that is in a file; an earlier one may have been interrupted."""
        target = self._tmp / str(tree)
        remove_tree(target)
        self._work({"op": "lay", "file": str(file), "layers": ["u"], "target": str(new_directory(target))})
        failpoint("images.overlayfs.after_taking_out")
        return target

    def usage(self, tree: TreeId) -> Usage:
        base, file = self._active / str(tree), self._bounded / str(tree)
        if file.exists():
            return Usage(image_usage(file), 0)
        upper = base / "u"
        if upper.is_dir() and (counted := project_usage(base)) is not None:
            return Usage(counted.used_bytes, counted.inodes)
        return self._measure(upper) if upper.is_dir() else Usage(0, 0)  # a view of layers has no directory of its own

    def _measure(self, upper: Path) -> Usage:
        return measure(upper)

    def remove(self, tree: TreeId, *, go_on: GoOn = always) -> None:
        self._looks.pop(tree, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._bounded}/{tree}")  # noqa: PTH108 - a string
        if self._counts_projects:
            release_project(self._active / str(tree))
        if _remove_untouched(f"{self._active}/{tree}") or _remove_untouched(f"{self._ready}/{tree}"):
            return
        for above in (self._active, self._ready, self._tmp, self._layers):
            remove_tree(above / str(tree), go_on=go_on)

    def trees(self) -> Iterator[TreeId]:
        yield from map(TreeId, numbered(self._active, self._ready, self._tmp, self._layers, self._bounded))


def _make(base: str) -> None:
    """The directories of an active tree, whose root looks plain whatever the umask."""
    os.mkdir(base, 0o700)  # noqa: PTH102 - a string
    os.mkdir(f"{base}/w", 0o700)  # noqa: PTH102
    os.mkdir(f"{base}/u", 0o755)  # noqa: PTH102
    os.chmod(f"{base}/u", _PLAIN.mode)  # noqa: PTH101


def _remove_untouched(base: str) -> bool:
    """Remove an active tree that nothing was written to, with what the kernel left in its work directory; False if it
    is not such a one. What is named here is ours, never the container's."""
    try:
        os.rmdir(f"{base}/u")  # noqa: PTH106 - a string
        with contextlib.suppress(FileNotFoundError):  # it was never mounted
            os.rmdir(f"{base}/w/work")  # noqa: PTH106
        os.rmdir(f"{base}/w")  # noqa: PTH106
        os.rmdir(base)  # noqa: PTH106
    except OSError:
        return False
    return True
