"""Packs a tree into a tar: what Applier makes of a layer, made into a layer again.

    what hides NAME                     .wh.NAME
    what hides all in a directory       .wh..wh..opq in it

In each directory come first its files and then its directories, both in byte order, with times in whole seconds, so the
same tree gives the same bytes. Whoever wrote the tree may still be writing: every directory is opened from the root,
held below it and through no link, and everything else from its open directory, never followed. What goes away meanwhile
is left out; a file is as long as it was when its header was written.

Source: OCI image-spec layer.md; Documentation/filesystems/overlayfs.rst; GNU tar manual, "PAX Format, Version 1.0".
"""

import errno
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from corral.images.layers.apply import OPAQUE, USER_OVERLAY, WHITEOUT, XATTR_NAMES, XATTR_PREFIXES
from corral.images.layers.errors import BadLayer
from corral.images.layers.headers import END, header, padding
from corral.images.layers.hiding import Marks, is_opaque, is_whiteout, listed
from corral.images.layers.tar import MAX_PATH_BYTES, Entry, Kind
from corral.kernel.paths import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

CHUNK_BYTES = 1 << 20
MIN_HOLES_BYTES = 1 << 20  # less is not worth a form that few writers use

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# A FIFO that took a file's place must not make us wait.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHARACTER,
    stat.S_IFBLK: Kind.BLOCK,
    stat.S_IFIFO: Kind.FIFO,
}


def packed(root: int, marks: Marks = Marks.OVERLAY) -> Iterator[bytes]:
    """The tar of the tree below the directory `root`, with what its marks hide. Raises OSError, and BadLayer
    for what no tar can hold."""
    yield from _Packer(root, marks).pack()
    yield END


def packed_changes(root: int, changes: Iterable[tuple[bool, str]]) -> Iterator[bytes]:
    """The tar of these paths alone: whether each has gone, in the order of packed(). Raises BadLayer, OSError."""
    yield from _Packer(root).pack_some(changes)
    yield END


def open_directory(root: int, path: str) -> int | None:
    """The directory at `path` below `root`, "" being that; None if there is no longer one, or behind a link."""
    try:
        return openat2(root, path or ".", _DIRECTORY, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


class _Packer:
    """One tree."""

    def __init__(self, root: int, marks: Marks = Marks.OVERLAY) -> None:
        self._root = root
        self._marks = marks
        self._links: dict[tuple[int, int], bytes] = {}

    def pack(self) -> Iterator[bytes]:
        waiting = [""]
        while waiting:
            path = waiting.pop()
            fd = open_directory(self._root, path)
            if fd is None:
                continue
            try:
                if path:
                    yield from self._directory(path, fd)
                below = yield from self._inside(path, fd)
            finally:
                os.close(fd)
            waiting += reversed(below)

    def pack_some(self, changes: Iterable[tuple[bool, str]]) -> Iterator[bytes]:
        with ExitStack() as opened:
            above, parent = "", opened.enter_context(_closing(open_directory(self._root, "")))
            for gone, path in changes:
                directory, _, name = path.rpartition("/")
                if directory != above:
                    opened.pop_all().close()
                    above, parent = directory, opened.enter_context(_closing(open_directory(self._root, directory)))
                _check_length(path)
                if gone:
                    yield _whiteout(os.fsencode(path))
                elif parent is not None:
                    with suppress(FileNotFoundError):
                        yield from self._one(path, name, parent)

    def _one(self, path: str, name: str, parent: int) -> Iterator[bytes]:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            yield from self._other(path, name, parent, status)
            return
        with _closing(open_directory(self._root, path)) as fd:
            if fd is not None:
                entry = _entry(os.fsencode(path) + b"/", Kind.DIRECTORY, os.fstat(fd))
                entry.xattrs = attributes_of(fd)
                yield header(entry)

    def _directory(self, path: str, fd: int) -> Iterator[bytes]:
        entry = _entry(os.fsencode(path) + b"/", Kind.DIRECTORY, os.fstat(fd))
        entry.xattrs = attributes_of(fd)
        yield header(entry)
        if is_opaque(fd, self._marks):
            yield header(Entry(entry.name + OPAQUE.encode(), Kind.FILE, 0, 0, 0, 0, 0))

    def _inside(self, path: str, fd: int) -> Generator[bytes, None, list[str]]:
        """Everything but directories, whose paths are returned."""
        below = []
        for name, status in listed(fd, self._marks):
            inside = f"{path}/{name}" if path else name
            _check_length(inside)
            if status is None:
                yield _whiteout(os.fsencode(inside))
            elif stat.S_ISDIR(status.st_mode):
                below.append(inside)
            else:
                with suppress(FileNotFoundError):
                    yield from self._other(inside, name, fd, status)
        return below

    def _other(self, path: str, name: str, parent: int, status: os.stat_result) -> Iterator[bytes]:
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        full = os.fsencode(path)
        if is_whiteout(status):
            yield _whiteout(full)
        elif kind is Kind.FILE:
            yield from self._file(full, name, parent)
        elif kind is not None and not self._is_linked(full, status):
            entry = _entry(full, kind, status)
            if kind is Kind.SYMLINK:
                entry.link = os.fsencode(os.readlink(name, dir_fd=parent))
            yield header(entry)
        elif kind is not None:
            yield header(self._link(full, status))

    def _is_linked(self, full: bytes, status: os.stat_result) -> bool:
        """Whether the same inode is in the archive already, under another name."""
        key = status.st_dev, status.st_ino
        return status.st_nlink > 1 and self._links.setdefault(key, full) != full

    def _link(self, full: bytes, status: os.stat_result) -> Entry:
        entry = _entry(full, Kind.HARDLINK, status)
        entry.link = self._links[status.st_dev, status.st_ino]
        return entry

    def _file(self, full: bytes, name: str, parent: int) -> Iterator[bytes]:
        try:
            fd = os.open(name, _FILE, dir_fd=parent)
        except OSError as e:  # a link or a socket took its place
            raise FileNotFoundError from e
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return
            if self._is_linked(full, status):
                yield header(self._link(full, status))
                return
            entry = _entry(full, Kind.FILE, status)
            entry.size, entry.xattrs = status.st_size, attributes_of(fd)
            yield from _content(entry, fd, status)
        finally:
            os.close(fd)


def _check_length(path: str) -> None:
    if len(os.fsencode(path)) >= MAX_PATH_BYTES:
        raise BadLayer(f"the path {path[:60]!r}… is longer than {MAX_PATH_BYTES} bytes")


def _whiteout(full: bytes) -> bytes:
    above, _, last = full.rpartition(b"/")
    return header(Entry(above + b"/" * bool(above) + WHITEOUT.encode() + last, Kind.FILE, 0, 0, 0, 0, 0))


@contextmanager
def _closing(fd: int | None) -> Iterator[int | None]:
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _content(entry: Entry, fd: int, status: os.stat_result) -> Iterator[bytes]:
    extents = _extents(fd, status)
    if extents is not None:
        entry.extents = tuple(extents)
    yield header(entry)
    stored = 0
    for offset, length in extents if extents is not None else [(0, entry.size)]:
        yield from _exactly(fd, offset, length)
        stored += length
    yield padding(stored)


def _extents(fd: int, status: os.stat_result) -> list[tuple[int, int]] | None:
    """Where a file has data, if it has holes that are worth it. The last one ends the file, if only with nothing."""
    size = status.st_size
    if size - status.st_blocks * 512 < MIN_HOLES_BYTES:
        return None
    found: list[tuple[int, int]] = []
    position = 0
    with suppress(OSError):  # ENXIO: nothing but a hole from here on
        while position < size:
            start = os.lseek(fd, position, os.SEEK_DATA)
            position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
            if start < position:
                found.append((start, position - start))
    if size - sum(length for _, length in found) < MIN_HOLES_BYTES:
        return None
    return [*found, (size, 0)]


def _exactly(fd: int, offset: int, length: int) -> Iterator[bytes]:
    """That many bytes, zeros where the file has become shorter."""
    end = offset + length
    while offset < end:
        wanted = min(CHUNK_BYTES, end - offset)
        data = os.pread(fd, wanted, offset) or bytes(wanted)
        offset += len(data)
        yield data


def _entry(name: bytes, kind: Kind, status: os.stat_result) -> Entry:
    is_device = kind in (Kind.CHARACTER, Kind.BLOCK)
    return Entry(
        name=name,
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=0,
        mtime_ns=status.st_mtime_ns,
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
    )


def attributes_of(fd: int | str) -> dict[bytes, bytes]:
    """Those that an unpacker may set. A name with "=" has no form in a PAX header."""
    found = {}
    for text in sorted(os.listxattr(fd)):
        name = os.fsencode(text)
        wanted = (name.startswith(XATTR_PREFIXES) and not name.startswith(USER_OVERLAY)) or name in XATTR_NAMES
        if wanted and b"=" not in name:
            with suppress(OSError):
                found[name] = os.getxattr(fd, text)
    return found
