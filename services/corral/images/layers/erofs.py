"""Writing EROFS images: data first, as it comes, and at the end all that describes it.

    block 0      the superblock, at 1024
    block 1 …    the data of files, each beginning with a block of its own
    meta_blkaddr inodes, 32 bytes a number: header, attributes, then the table of chunks of a sparse file, or what is
                 small enough of a directory or link to be kept right there; directories that are larger come after them

Neither compressed nor deduplicated, and every inode in the long form. Images are written anew and never changed.
Source: Documentation/filesystems/erofs.rst; fs/erofs/erofs_fs.h.
"""

import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from corral.images.layers.errors import BadLayer
from corral.images.layers.nodes import Node, everything

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
MAGIC = 0xE0F5E1E2
SUPERBLOCK_AT = 1024

_SLOT = 32
_INODE_BYTES = 64
_FIRST_SLOT = 2  # number 0 is no inode's, to some readers of directories
_PLAIN, _INLINE, _CHUNKED = 0, 2, 4
_NOWHERE = 0xFFFF_FFFF
_MAX_BLOCKS = 0xFFFF_FFFE
_MAX_CHUNKS = 1 << 20
_COMPAT_MTIME, _INCOMPAT_CHUNKED = 2, 4

# magic checksum compat blkszbits extslots root_nid inos epoch nsec blocks meta_blkaddr xattr_blkaddr uuid name incompat
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
# format xattr_icount mode reserved size u ino uid gid mtime mtime_nsec nlink
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBx")
_XATTR_HEADER_BYTES = 12
_XATTR = struct.Struct("<BBH")
_PREFIXES = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)
_KINDS = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


class ImageWriter:
    """An image on its way into a new file. First data, then finish()."""

    def __init__(self, file: BinaryIO, *, blocks: int = 1) -> None:
        """file: seekable, buffered. blocks: as many as an earlier writer of the same file had."""
        self._file = file
        self.blocks = blocks
        file.seek(blocks * BLOCK)

    def data(self, chunks: Iterable[memoryview]) -> tuple[int, int]:
        """Append the chunks: how many bytes they were, and where their first block is. Raises OSError, BadLayer."""
        size = 0
        for chunk in chunks:
            self._file.write(chunk)
            size += len(chunk)
        self._file.write(bytes(-size % BLOCK))  # to seek would be to flush
        return size, self._reserve(size)

    def _reserve(self, size: int) -> int:
        start, self.blocks = self.blocks, self.blocks + -(-size // BLOCK)
        if self.blocks > _MAX_BLOCKS:
            raise BadLayer("it holds more than an EROFS image can")
        return start

    def sparse_data(
        self, size: int, extents: Iterable[tuple[int, int]], payload: Callable[[int], Iterable[memoryview]]
    ) -> list[tuple[int, int, int]]:
        """Append the data of a file of `size` bytes that has holes; payload gives the next so many bytes of it.

        Returns its extents, as a node has them: chunks, of which there are not too many. The image has holes as well.
        """
        bits = chunk_bits(size)
        length, first = 1 << bits, {}
        for offset, count in extents:
            for piece in _split(offset, payload(count), length):
                number, within, view = piece
                if number not in first:
                    first[number] = self._reserve(min(length, size - (number << bits)))
                self._file.seek(first[number] * BLOCK + within)
                self._file.write(view)
        self._file.seek(self.blocks * BLOCK)
        return [(n << bits, min(length, size - (n << bits)), block) for n, block in sorted(first.items())]

    def finish(self, root: Node) -> None:
        """Write what describes the tree, and the superblock. Raises OSError, BadLayer."""
        _Description(root, self.blocks).write(self._file)


def _split(offset: int, chunks: Iterable[memoryview], length: int) -> Iterator[tuple[int, int, memoryview]]:
    """Pieces of a file's data that lie within one chunk each: its number, where in it, and the bytes."""
    for view in chunks:
        while view:
            number, within = divmod(offset, length)
            part = view[: length - within]
            yield number, within, part
            offset, view = offset + len(part), view[len(part) :]


def chunk_bits(size: int) -> int:
    """How large the chunks of a sparse file are: a block, or so much that the table of them stays small."""
    return max(BLOCK_BITS, ((size - 1) // _MAX_CHUNKS).bit_length()) if size else BLOCK_BITS


@dataclass(slots=True)
class _Inode:
    """A node with its place: its number, and what follows its header."""

    node: Node
    xattrs: bytes
    number: int = 0
    # What is kept with the inode; of a directory only as long as it is, until all numbers are known.
    tail_bytes: int = 0
    layout: int = _PLAIN
    block: int = _NOWHERE
    size: int = 0
    blocks: int = 0


class _Description:
    """All inodes and directories of a tree, once the data is there."""

    def __init__(self, root: Node, meta_block: int) -> None:
        self._meta = meta_block
        self._inodes: dict[int, _Inode] = {}
        self._parents: dict[int, Node] = {id(root): root}
        self._root = root
        for _, node in everything(root):
            if id(node) not in self._inodes:
                self._inodes[id(node)] = _Inode(node, _packed_xattrs(node.xattrs))
            for child in node.children.values():
                if child.is_directory:
                    self._parents[id(child)] = node
        self._place()

    def _place(self) -> None:
        """Give every inode its number, and everything else its blocks."""
        position = _FIRST_SLOT * _SLOT
        for inode in self._inodes.values():
            self._measure(inode)
            position = _start(inode, position)
            inode.number = position // _SLOT
            position += _INODE_BYTES + len(inode.xattrs) + inode.tail_bytes
        block = self._meta + -(-position // BLOCK)
        for inode in self._inodes.values():
            if inode.blocks:
                inode.block, block = block, block + inode.blocks
        if block > _MAX_BLOCKS:
            raise BadLayer("it holds more than an EROFS image can")
        self._blocks = block

    def _measure(self, inode: _Inode) -> None:
        node = inode.node
        if node.is_directory:
            pages = _pages(node)  # made again when they are written: all of them would be most of what is in memory
            inode.size = (len(pages) - 1) * BLOCK + sum(_DIRENT.size + len(name) for name, _ in pages[-1])
            self._keep_if_small(inode)
        elif stat.S_ISLNK(node.mode):
            inode.size = len(node.link)
            self._keep_if_small(inode)
        elif stat.S_ISREG(node.mode):
            inode.size = node.size
            self._measure_file(inode)

    @staticmethod
    def _keep_if_small(inode: _Inode) -> None:
        if _INODE_BYTES + len(inode.xattrs) + inode.size <= BLOCK:
            inode.layout, inode.tail_bytes = _INLINE, inode.size
        else:
            inode.blocks = -(-inode.size // BLOCK)

    @staticmethod
    def _measure_file(inode: _Inode) -> None:
        node = inode.node
        if not node.size:
            return
        if len(node.extents) == 1 and node.extents[0][:2] == (0, node.size):
            inode.block = node.extents[0][2]
        else:
            bits = chunk_bits(node.size)
            inode.layout, inode.tail_bytes = _CHUNKED, 4 * (-(-node.size >> bits))

    def write(self, file: BinaryIO) -> None:
        file.seek(self._meta * BLOCK)
        written = 0
        for inode in self._inodes.values():
            file.write(bytes(inode.number * _SLOT - written))
            data = self._packed(inode)
            file.write(data)
            written = inode.number * _SLOT + len(data)
        for inode in self._inodes.values():
            if inode.blocks:
                file.seek(inode.block * BLOCK)
                file.write(self._content(inode))
        file.seek(0, os.SEEK_END)
        file.write(bytes(self._blocks * BLOCK - file.tell()))
        file.seek(SUPERBLOCK_AT)
        file.write(self._superblock())

    def _packed(self, inode: _Inode) -> bytes:
        node = inode.node
        nlink = 2 + sum(child.is_directory for child in node.children.values()) if node.is_directory else node.names
        seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
        icount = (len(inode.xattrs) - _XATTR_HEADER_BYTES) // 4 + 1 if inode.xattrs else 0
        header = _INODE.pack(
            1 | inode.layout << 1, icount, node.mode, 0, inode.size, self._where(inode), inode.number & 0xFFFF_FFFF,
            node.uid, node.gid, seconds & 0xFFFF_FFFF_FFFF_FFFF, nanoseconds, nlink,
        )  # fmt: skip
        if inode.layout == _CHUNKED:
            return header + inode.xattrs + _chunk_table(node)
        return header + inode.xattrs + (self._content(inode) if inode.layout == _INLINE else b"")

    @staticmethod
    def _where(inode: _Inode) -> int:
        node = inode.node
        if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
            major, minor = os.major(node.rdev), os.minor(node.rdev)
            return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
        if inode.layout == _CHUNKED:
            return chunk_bits(node.size) - BLOCK_BITS
        return inode.block

    def _content(self, inode: _Inode) -> bytes:
        node = inode.node
        if not node.is_directory:
            return node.link
        pages = [self._page(node, page) for page in _pages(node)]
        return b"".join([*(page.ljust(BLOCK, b"\0") for page in pages[:-1]), pages[-1]])

    def _page(self, directory: Node, page: list[tuple[bytes, Node | None]]) -> bytes:
        entries, names, at = [], [], _DIRENT.size * len(page)
        for name, child in page:
            node = child or (directory if name == b"." else self._parents[id(directory)])
            entries.append(_DIRENT.pack(self._inodes[id(node)].number, at, _KINDS[stat.S_IFMT(node.mode)]))
            names.append(name)
            at += len(name)
        return b"".join(entries + names)

    def _superblock(self) -> bytes:
        incompat = _INCOMPAT_CHUNKED if any(inode.layout == _CHUNKED for inode in self._inodes.values()) else 0
        root = self._inodes[id(self._root)].number
        return _SUPERBLOCK.pack(
            MAGIC, 0, _COMPAT_MTIME, BLOCK_BITS, 0, root, len(self._inodes), 0, 0, self._blocks, self._meta, 0,
            bytes(16), bytes(16), incompat,
        )  # fmt: skip


def _start(inode: _Inode, position: int) -> int:
    """Where an inode can begin: what it keeps of its content may not lie across the end of a block."""
    position += -position % _SLOT
    if inode.layout == _INLINE and inode.tail_bytes:
        tail = (position + _INODE_BYTES + len(inode.xattrs)) % BLOCK
        if tail + inode.tail_bytes > BLOCK:
            position += -position % BLOCK
    return position


def _pages(directory: Node) -> list[list[tuple[bytes, Node | None]]]:
    """The entries of a directory in the order of their bytes, by the block. None: itself, or the one above."""
    entries: list[tuple[bytes, Node | None]] = [
        (os.fsencode(name), child) for name, child in directory.children.items()
    ]
    entries += [(b".", None), (b"..", None)]
    entries.sort(key=lambda entry: entry[0])
    return list(_by_the_block(entries))


def _by_the_block(entries: Iterable[tuple[bytes, Node | None]]) -> Iterator[list[tuple[bytes, Node | None]]]:
    page: list[tuple[bytes, Node | None]] = []
    room = BLOCK
    for entry in entries:
        needed = _DIRENT.size + len(entry[0])
        if needed > room:
            yield page
            page, room = [], BLOCK
        page.append(entry)
        room -= needed
    yield page


def _chunk_table(node: Node) -> bytes:
    bits = chunk_bits(node.size)
    blocks = {offset >> bits: block for offset, _, block in node.extents}
    count = -(-node.size >> bits)
    return struct.pack(f"<{count}I", *(blocks.get(number, _NOWHERE) for number in range(count)))


def _packed_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    """As they lie behind the inode; nothing if there are none. Raises BadLayer."""
    packed = []
    for name, value in sorted(xattrs.items()):
        prefix, index = next((p, i) for p, i in _PREFIXES if name.startswith(p))
        suffix = name[len(prefix) :]
        if len(suffix) > 255 or len(value) > 0xFFFF:
            raise BadLayer(f"the attribute {os.fsdecode(name)[:80]!r} is larger than an EROFS image can hold")
        entry = _XATTR.pack(len(suffix), index, len(value)) + suffix + value
        packed.append(entry + bytes(-len(entry) % 4))
    if not packed:
        return b""
    data = bytes(_XATTR_HEADER_BYTES) + b"".join(packed)
    if (len(data) - _XATTR_HEADER_BYTES) // 4 + 1 > 0xFFFF:
        raise BadLayer("a file has more attributes than an EROFS image can hold")
    return data


def look_of_root(path: str) -> tuple[int, int, int]:
    """Mode, owner and group of the root directory of an image of ours. Raises OSError."""
    with open(path, "rb") as file:
        superblock = _SUPERBLOCK.unpack(os.pread(file.fileno(), _SUPERBLOCK.size, SUPERBLOCK_AT))
        root, meta = superblock[5], superblock[10]
        inode = _INODE.unpack(os.pread(file.fileno(), _INODE.size, meta * BLOCK + root * _SLOT))
    return stat.S_IMODE(inode[2]), inode[7], inode[8]
