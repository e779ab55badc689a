"""A directory tree in memory: what an archive says that there is, before any of it is anywhere.

It resolves paths as the kernel does in a root of its own: links are followed inside, and ".." stops at the top.
"""

import os
import stat
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

from corral.images.layers.errors import BadLayer

NO_XATTRS: Mapping[bytes, bytes] = MappingProxyType({})

_MAX_LINKS = 40


@dataclass(slots=True, eq=False)
class Node:
    """A file of any kind. Hard links are one node under several names."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    # Where its data is: (offset in the file, length, first block), in order; what is between them is a hole.
    extents: Sequence[tuple[int, int, int]] = ()
    rdev: int = 0
    link: bytes = b""
    xattrs: Mapping[bytes, bytes] = NO_XATTRS
    # Of a directory, and of all else the same one that stays empty: a layer has far more files than directories.
    children: dict[str, "Node"] = field(init=False)
    names: int = 1
    # A directory that no entry describes.
    implicit: bool = False
    # A directory that hides what is below it.
    opaque: bool = False
    # Made to hide what is below it, and not because there is such a device.
    whiteout: bool = False

    def __post_init__(self) -> None:
        self.children = {} if self.is_directory else _NO_CHILDREN

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def new_directory() -> Node:
    """One that no entry describes."""
    return Node(stat.S_IFDIR | 0o755, mtime_ns=time.time_ns(), implicit=True)


def new_whiteout() -> Node:
    return Node(stat.S_IFCHR, mtime_ns=time.time_ns(), whiteout=True)


_NO_CHILDREN = cast(dict[str, Node], MappingProxyType({}))


class NodeTree:
    """The nodes below a root, and the directory that was resolved last."""

    def __init__(self, root: Node | None = None) -> None:
        self.root = root or new_directory()
        self._resolved: tuple[list[str], Node] | None = None

    def parent(self, parts: Sequence[str]) -> Node:
        """The directory of all `parts` but the last; what is missing is made. Raises BadLayer."""
        above = list(parts[:-1])
        if self._resolved is not None and self._resolved[0] == above:  # entries come grouped by directory
            return self._resolved[1]
        found = self._walk(above, make=True)
        assert found is not None
        self._resolved = above, found
        return found

    def find(self, parts: Sequence[str]) -> Node | None:
        """The node at `parts`, whose last one is not followed; None if there is none."""
        if not parts:
            return self.root
        above = self._walk(parts[:-1], make=False)
        return None if above is None else above.children.get(parts[-1])

    def put(self, parent: Node, name: str, node: Node) -> None:
        """Have `node` there, in place of what is."""
        old = parent.children.pop(name, None)
        if old is not None:
            self._resolved = None
            old.names -= 1
        parent.children[name] = node

    def _walk(self, parts: Sequence[str], *, make: bool) -> Node | None:
        path = "/".join(parts)
        at, pending, links = [self.root], deque(parts), 0
        while pending:
            name = pending.popleft()
            if name in ("", "."):
                continue
            if name == "..":
                del at[max(1, len(at) - 1) :]
                continue
            child = at[-1].children.get(name)
            if child is None:
                if not make:
                    return None
                child = at[-1].children[name] = new_directory()
            if stat.S_ISLNK(child.mode):
                links += 1
                if links > _MAX_LINKS and not make:
                    return None
                if links > _MAX_LINKS:
                    raise BadLayer(f"the links at {path[:200]!r} lead in a circle")
                target = os.fsdecode(child.link)
                if target.startswith("/"):
                    del at[1:]
                pending.extendleft(reversed(target.split("/")))
            elif child.is_directory:
                at.append(child)
            elif make:
                raise BadLayer(f"an entry lies below {path[:200]!r}, which is not a directory")
            else:
                return None
        return at[-1]


def everything(root: Node) -> Iterator[tuple[str, Node]]:
    """Every path and its node, the root's being "", parents first. However deep."""
    pending = [("", root)]
    while pending:
        path, node = pending.pop()
        yield path, node
        prefix = f"{path}/" if path else ""
        pending += [(prefix + name, child) for name, child in node.children.items()]
