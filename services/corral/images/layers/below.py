"""What a layer takes from the layers below it, once those are there.

Layers are unpacked side by side, each alone. Two things then remain: a directory that no entry of the layer describes
has owner, mode, time and attributes of the same directory below; and a hard link may lead to a file below, which has to
be copied up then, as overlayfs would do it.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from corral.images.layers.errors import BadLayer
from corral.images.layers.hiding import Marks, has_whiteout, is_opaque, is_whiteout
from corral.images.layers.tree import Tree
from corral.kernel.paths import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2


def complete(
    layer: Path,
    below: Sequence[Path],
    implicit: Sequence[str],
    links: Sequence[tuple[str, str]],
    marks: Marks = Marks.OVERLAY,
) -> int:
    """Finish the unpacked `layer`; `below` are the layers under it, the uppermost first, with these marks. Returns the
    bytes added.

    Raises BadLayer if a hard link leads nowhere.
    """
    if not implicit and not links:
        return 0
    with ExitStack() as stack:
        roots = [_opened_root(path, stack) for path in below]
        tree = stack.enter_context(Tree(layer))
        added = sum(_link(tree, roots, name, target, marks) for name, target in links)
        # Deepest first, the root last: what happens in a directory changes its time.
        for path in sorted({*implicit, *tree.implicit}, key=_depth, reverse=True):
            _inherit(tree, roots, path, marks)
    return added


def _depth(path: str) -> int:
    return len(path.split("/")) if path else 0


def _opened_root(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


@contextmanager
def visible(roots: Sequence[int], path: str, marks: Marks = Marks.OVERLAY) -> Iterator[int | None]:
    """An O_PATH descriptor of what `path` is in the layers `roots`, the uppermost first; None if nothing, or hidden."""
    fd = None
    for root in roots:
        fd = _open_beneath(root, path)
        if fd is not None or _hides(root, path, marks):
            break
    if fd is not None and is_whiteout(os.fstat(fd)):
        os.close(fd)
        fd = None
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _open_beneath(root: int, path: str) -> int | None:
    try:
        return openat2(root, path, os.O_PATH | os.O_NOFOLLOW, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        if e.errno == errno.ELOOP:  # a link on the way: not the same path. As the last part it is opened itself.
            return None
        raise


def _hides(root: int, path: str, marks: Marks) -> bool:
    """Whether a layer that lacks `path` hides what lies below it there."""
    parts = path.split("/")
    for depth, name in enumerate(parts):
        fd = _open_beneath(root, "/".join(parts[:depth]) or ".")
        if fd is None:
            return False
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode) or (depth and is_opaque(fd, marks)):
                return True
            if has_whiteout(fd, name, marks):
                return True
        finally:
            os.close(fd)
    return False


def _inherit(tree: Tree, roots: Sequence[int], path: str, marks: Marks) -> None:
    parts = path.split("/") if path else ["."]
    parent = tree.find_parent(parts)
    with visible(roots, path or ".", marks) as source:
        if parent is None or source is None:
            return
        status = os.fstat(source)
        if not stat.S_ISDIR(status.st_mode):
            return
        fd = os.open(parts[-1], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            _copy_attributes(source, status, fd)
        finally:
            os.close(fd)


def _copy_attributes(source: int, status: os.stat_result, target: int) -> None:
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    path = f"/proc/self/fd/{source}"
    for name in os.listxattr(path):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(path, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _link(tree: Tree, roots: Sequence[int], name: str, target: str, marks: Marks) -> int:
    """Make hard link `name` to `target`, which this layer lacked when the entry came."""
    parts = target.split("/")
    added = 0
    found = tree.find_parent(parts)
    if found is None or not _exists(parts[-1], found):
        added = _copy_up(tree, roots, name, target, marks)
    names = name.split("/")
    source = os.dup(tree.parent(parts))
    try:
        at = tree.parent(names)
        tree.remove(names[-1], at)
        os.link(parts[-1], names[-1], src_dir_fd=source, dst_dir_fd=at, follow_symlinks=False)
    finally:
        os.close(source)
    return added


def _exists(name: str, parent: int) -> bool:
    try:
        return not is_whiteout(os.stat(name, dir_fd=parent, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _copy_up(tree: Tree, roots: Sequence[int], name: str, target: str, marks: Marks) -> int:
    parts = target.split("/")
    with visible(roots, target, marks) as source:
        if source is None or not stat.S_ISREG(os.fstat(source).st_mode):
            raise BadLayer(f"entry {name[:200]!r} is a hard link to {target[:200]!r}, which no layer has")
        status = os.fstat(source)
        at = tree.parent(parts)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        copy = os.open(parts[-1], flags, 0o600, dir_fd=at)
        data = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while os.sendfile(copy, data, None, 1 << 30):
                pass
            _copy_attributes(source, status, copy)
        finally:
            os.close(data)
            os.close(copy)
    return status.st_size
