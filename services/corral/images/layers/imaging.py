"""Makes an EROFS image of a layer straight from its tar: the data is written once, in the order in which it comes.

What the entries mean is as in corral.images.layers.apply, and comes out the same: there in a directory, here in nodes
in memory. If the layer takes something from those below it, the tree waits in a file of its own until these are there.
"""

import contextlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from corral.images.layers.apply import (
    OPAQUE,
    OPAQUE_XATTR,
    USER_OVERLAY,
    WHITEOUT,
    XATTR_NAMES,
    XATTR_PREFIXES,
    Applied,
    Limits,
    is_bookkeeping,
)
from corral.images.layers.below import visible
from corral.images.layers.erofs import ImageWriter
from corral.images.layers.errors import BadLayer
from corral.images.layers.nodes import NO_XATTRS, Node, NodeTree, everything, new_directory, new_whiteout
from corral.images.layers.tar import Entry, Kind, TarReader
from corral.images.layers.tree import MAX_IMPLICIT_BYTES, TOO_MUCH_IMPLICIT, components

IMAGE, WAITING = "image", "tree.json"

_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHARACTER: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
}
_NAME_MAX = 255
_CHUNK = 1 << 20
_CAPABILITY_BYTES = {1: 12, 2: 20, 3: 24}  # by the revision. Source: linux/capability.h
_ACL_TAGS = frozenset((0x01, 0x02, 0x04, 0x08, 0x10, 0x20))  # Source: linux/posix_acl_xattr.h
_ACL_ONCE, _ACL_NAMED, _ACL_MASK = (0x01, 0x04, 0x20), frozenset((0x02, 0x08)), 0x10
_MAX_FILE_BYTES = 1 << 44  # what ext4 takes, where copies of it would lie


class Imager:
    """One layer on its way into an image."""

    def __init__(self, image: ImageWriter, *, bottom: bool, limits: Limits) -> None:
        """bottom: no layer lies below this one, so there is nothing to hide and no link can lead out."""
        self.tree = NodeTree()
        self._image, self._bottom, self._limits = image, bottom, limits
        self._result = Applied()

    def apply(self, reader: TarReader, on_entry: Callable[[], None] = lambda: None) -> Applied:
        """Raises BadLayer, OSError."""
        self._reader = reader
        for count, entry in enumerate(reader):
            if count >= self._limits.entries:
                raise BadLayer(f"it has more than {self._limits.entries} entries")
            self._entry(entry)
            on_entry()
        return self._summary()

    def _entry(self, entry: Entry) -> None:
        parts = components(entry.name)
        if not parts:
            if entry.kind is not Kind.DIRECTORY:
                raise BadLayer(f"entry {entry.shown} would replace the root directory")
            self._describe(self.tree.root, entry)
            return
        if is_bookkeeping(entry, parts):
            return
        if len(entry.name) > _NAME_MAX and any(len(os.fsencode(part)) > _NAME_MAX for part in parts):
            raise BadLayer(f"entry {entry.shown} has a part that is too long for a file system")
        if parts[-1].startswith(WHITEOUT):
            self._whiteout(entry, parts)
        elif entry.kind is Kind.HARDLINK:
            self._hardlink(entry, parts)
        elif entry.kind is Kind.DIRECTORY:
            self._directory(entry, parts)
        else:
            self.tree.put(self.tree.parent(parts), parts[-1], self._made(entry))

    def _made(self, entry: Entry) -> Node:
        """Of a file, link, device or FIFO."""
        if entry.kind is Kind.SYMLINK and not entry.link:
            raise BadLayer(f"entry {entry.shown} is a symbolic link to nothing")
        node = Node(_TYPES[entry.kind], link=entry.link, rdev=os.makedev(*entry.device))
        self._describe(node, entry)
        if entry.kind is Kind.SYMLINK:
            node.mode, node.xattrs = stat.S_IFLNK | 0o777, NO_XATTRS
        elif entry.kind is Kind.FILE:
            self._take_data(node, entry)
        else:
            node.xattrs = NO_XATTRS
        return node

    def _take_data(self, node: Node, entry: Entry) -> None:
        stored = entry.size if entry.extents is None else sum(length for _, length in entry.extents)
        self._result.size_bytes += stored
        if self._result.size_bytes > self._limits.bytes:
            raise BadLayer(f"it unpacks to more than {self._limits.bytes} bytes")
        if entry.size > _MAX_FILE_BYTES:
            raise BadLayer(f"entry {entry.shown} cannot be made: a file of {entry.size} bytes is too large")
        node.size = entry.size
        if entry.extents is not None:
            node.extents = self._image.sparse_data(entry.size, entry.extents, self._reader.payload)
        elif entry.size:
            size, block = self._image.data(self._reader.payload())
            node.extents = ((0, size, block),)

    def _describe(self, node: Node, entry: Entry) -> None:
        node.mode = stat.S_IFMT(node.mode) | entry.mode
        node.uid, node.gid, node.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
        node.xattrs, node.implicit = _wanted_xattrs(entry), False

    def _directory(self, entry: Entry, parts: list[str]) -> None:
        parent, name = self.tree.parent(parts), parts[-1]
        node = parent.children.get(name)
        if node is None or not node.is_directory:
            hides = node is not None and node.whiteout
            node = new_directory()
            node.opaque = hides
            self.tree.put(parent, name, node)
        self._describe(node, entry)

    def _hardlink(self, entry: Entry, parts: list[str]) -> None:
        target = components(entry.link)
        if not target:
            raise BadLayer(f"entry {entry.shown} is a hard link to a directory")
        if target == parts:
            return
        parent, node = self.tree.parent(parts), self.tree.find(target)
        if node is None or node.whiteout:
            if self._bottom:
                raise BadLayer(
                    f"entry {entry.shown} is a hard link to {entry.link[:200]!r}, which the layer does not have"
                )
            self._result.links.append(("/".join(parts), "/".join(target)))
            return
        if node.is_directory:
            raise BadLayer(f"entry {entry.shown} is a hard link to a directory")
        if parent.children.get(parts[-1]) is node:
            return
        node.names += 1
        self.tree.put(parent, parts[-1], node)

    def _whiteout(self, entry: Entry, parts: list[str]) -> None:
        if parts[-1] == OPAQUE:
            self.tree.parent(parts).opaque = True
            return
        name = parts[-1].removeprefix(WHITEOUT)
        if name in ("", ".", ".."):
            raise BadLayer(f"entry {entry.shown} hides no name that can exist")
        if self._bottom:
            return
        parent = self.tree.parent(parts)
        node = parent.children.get(name)
        if node is None:
            self.tree.put(parent, name, new_whiteout())
        elif node.is_directory:
            node.opaque = True  # removed below and made anew here

    def _summary(self) -> Applied:
        nodes, noted_bytes = {}, 0
        for path, node in everything(self.tree.root):
            nodes[id(node)] = node
            if node.implicit and not self._bottom:  # else there is nobody to ask what they look like
                self._result.implicit.append(path)
                noted_bytes += len(path)
                if noted_bytes > MAX_IMPLICIT_BYTES:
                    raise BadLayer(TOO_MUCH_IMPLICIT)
        self._result.implicit.sort()
        self._result.inodes = len(nodes) - 1
        return self._result


def finish(image: ImageWriter, tree: NodeTree, *, bottom: bool) -> None:
    """Mark what hides something, as overlayfs wants it, and end the image. Raises OSError, BadLayer."""
    for _, node in list(everything(tree.root)):
        if not node.opaque or bottom:
            continue
        node.xattrs = {**node.xattrs, OPAQUE_XATTR.encode(): b"y"}
        # Inside an opaque directory overlayfs takes a whiteout for an ordinary device and shows it.
        node.children = {name: child for name, child in node.children.items() if not child.whiteout}
    image.finish(tree.root)


def complete_image(
    directory: Path, below: Sequence[int], implicit: Sequence[str], links: Sequence[tuple[str, str]]
) -> int:
    """End the image of a layer that waits for those `below` it: descriptors of their roots, the uppermost first.

    Returns the bytes added. Raises OSError, BadLayer if a hard link leads nowhere.
    """
    waiting = directory / WAITING
    tree, blocks = _read(waiting)
    with open(directory / IMAGE, "r+b", buffering=_CHUNK) as file:
        image = ImageWriter(file, blocks=blocks)
        added = sum(_link(tree, image, below, name, target) for name, target in links)
        known = {path for path, node in everything(tree.root) if node.implicit}
        for path in sorted({*implicit} | known):
            _inherit(tree, below, path)
        finish(image, tree, bottom=False)
    waiting.unlink()
    return added


def _link(tree: NodeTree, image: ImageWriter, below: Sequence[int], name: str, target: str) -> int:
    parts, names, added = target.split("/"), name.split("/"), 0
    node = tree.find(parts)
    if node is None or node.whiteout:
        node = _copy_up(image, below, name, target)
        added = node.size
        tree.put(tree.parent(parts), parts[-1], node)
    node.names += 1
    tree.put(tree.parent(names), names[-1], node)
    return added


def _copy_up(image: ImageWriter, below: Sequence[int], name: str, target: str) -> Node:
    with visible(below, target) as source:
        if source is None or not stat.S_ISREG(os.fstat(source).st_mode):
            raise BadLayer(f"entry {name[:200]!r} is a hard link to {target[:200]!r}, which no layer has")
        node = Node(stat.S_IFREG)
        _take_attributes(node, source)
        with open(f"/proc/self/fd/{source}", "rb", buffering=0) as file:
            node.size, block = image.data(_chunks(file.fileno()))
        node.extents = [(0, node.size, block)] if node.size else []
        return node


def _chunks(fd: int) -> Iterator[memoryview]:
    while data := os.read(fd, _CHUNK):
        yield memoryview(data)


def _inherit(tree: NodeTree, below: Sequence[int], path: str) -> None:
    node = tree.find(path.split("/") if path else [])
    if node is None or not node.is_directory or not node.implicit:
        return
    with visible(below, path or ".") as source:
        if source is not None and stat.S_ISDIR(os.fstat(source).st_mode):
            _take_attributes(node, source)


def _take_attributes(node: Node, source: int) -> None:
    status = os.fstat(source)
    node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(status.st_mode)
    node.uid, node.gid, node.mtime_ns = status.st_uid, status.st_gid, status.st_mtime_ns
    path = f"/proc/self/fd/{source}"
    names = [name for name in os.listxattr(path) if _is_wanted(name.encode())]
    node.xattrs = {name.encode(): os.getxattr(path, name) for name in names}


# Attributes


def _is_wanted(name: bytes) -> bool:
    return (name.startswith(XATTR_PREFIXES) and not name.startswith(USER_OVERLAY)) or name in XATTR_NAMES


def _wanted_xattrs(entry: Entry) -> Mapping[bytes, bytes]:
    """Those that images may bring. Raises BadLayer for one that a file system would have refused."""
    wanted = {name: value for name, value in entry.xattrs.items() if _is_wanted(name)}
    for name, value in wanted.items():
        if name.startswith(b"user."):
            continue
        is_valid = _is_capability(value) if name == b"security.capability" else _is_acl(value)
        if not is_valid:
            raise BadLayer(f"entry {entry.shown}: attribute {os.fsdecode(name)[:80]!r} cannot be set: it is malformed")
    return wanted or NO_XATTRS


def _is_capability(value: bytes) -> bool:
    return len(value) >= 4 and len(value) == _CAPABILITY_BYTES.get(int.from_bytes(value[:4], "little") >> 24)


def _is_acl(value: bytes) -> bool:
    if len(value) < 4 or len(value) % 8 != 4 or value[:4] != b"\2\0\0\0":
        return False
    entries = list(struct.iter_unpack("<HHI", value[4:]))
    tags = [tag for tag, _, _ in entries]
    once = all(tags.count(tag) == 1 for tag in _ACL_ONCE) and tags.count(_ACL_MASK) <= 1
    masked = _ACL_MASK in tags or _ACL_NAMED.isdisjoint(tags)
    return once and masked and tags == sorted(tags) and all(t in _ACL_TAGS and not mode & ~7 for t, mode, _ in entries)


# A tree that waits


def wait_for_below(directory: Path, tree: NodeTree, blocks: int) -> None:
    """Write the tree down, for complete_image(). Raises OSError."""
    numbers: dict[int, int] = {}
    rows: list[object] = []
    names: list[object] = []
    pending = [(tree.root, "", -1)]
    while pending:
        node, name, parent = pending.pop()
        if id(node) not in numbers:
            numbers[id(node)] = len(rows)
            rows.append(_row(node))
            pending += [(child, below, numbers[id(node)]) for below, child in node.children.items()]
        names.append((parent, name, numbers[id(node)]))
    with open(directory / WAITING, "w", encoding="ascii") as file:
        json.dump({"blocks": blocks, "nodes": rows, "names": names}, file)


def _row(node: Node) -> list[object]:
    xattrs = {name.decode("latin-1"): value.decode("latin-1") for name, value in node.xattrs.items()}
    flags = (node.implicit, node.opaque, node.whiteout)
    plain = (node.mode, node.uid, node.gid, node.mtime_ns, node.size, node.extents, node.rdev)
    return [*plain, node.link.decode("latin-1"), xattrs, *flags]


def _read(path: Path) -> tuple[NodeTree, int]:
    with open(path, encoding="ascii") as file:
        document = json.load(file)
    nodes = [_node(row) for row in document["nodes"]]
    for parent, name, number in document["names"]:
        if parent >= 0:
            nodes[parent].children[name] = nodes[number]
            nodes[number].names += 1
    return NodeTree(nodes[0]), document["blocks"]


def _node(row: list[object]) -> Node:
    mode, uid, gid, mtime_ns, size, extents, rdev, link, xattrs, implicit, opaque, whiteout = row
    node = Node(mode, uid, gid, mtime_ns, size, rdev=rdev, implicit=implicit, opaque=opaque, whiteout=whiteout)  # type: ignore[arg-type]
    node.names = 0
    node.extents = [(a, b, c) for a, b, c in extents]  # type: ignore[attr-defined]
    node.link = link.encode("latin-1")  # type: ignore[attr-defined]
    node.xattrs = {name.encode("latin-1"): value.encode("latin-1") for name, value in xattrs.items()}  # type: ignore[attr-defined]
    return node


@contextlib.contextmanager
def new_image(directory: Path) -> Iterator[ImageWriter]:
    """The writer of a new image in a directory. Raises OSError."""
    with open(directory / IMAGE, "xb", buffering=_CHUNK) as file:
        yield ImageWriter(file)
