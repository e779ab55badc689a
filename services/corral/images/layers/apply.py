"""Unpacks one layer into an empty directory, as overlayfs wants a layer to be.

    .wh.NAME       a character device 0:0 called NAME: hides NAME of the layers below
    .wh..wh..opq   the attribute trusted.overlay.opaque on its directory: hides all that the layers below have in it

Both speak about the layers below only: what this layer itself brings stays, in whatever order the entries come.
Owner, mode, times and attributes of directories are set last, since filling a directory changes its time, and an
inherited group or ACL would change what is made in it.

Source: OCI image-spec layer.md; Documentation/filesystems/overlayfs.rst "whiteouts and opaque directories".
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from corral.images.layers.bounds import ENTRY_BYTES
from corral.images.layers.errors import BadLayer
from corral.images.layers.tar import Entry, Kind, TarReader
from corral.images.layers.tree import Tree, components

WHITEOUT = ".wh."
WHITEOUT_META = ".wh..wh."
OPAQUE = ".wh..wh..opq"
_META = WHITEOUT_META.encode()
OPAQUE_XATTR = "trusted.overlay.opaque"

# Never trusted.* (trusted.overlay.redirect or .metacopy would steer overlayfs to files of its choosing), and never
# labels of this host's security modules.
XATTR_PREFIXES = (b"user.",)
XATTR_NAMES = frozenset({b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"})
USER_OVERLAY = b"user.overlay."

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FAULTS_OF_THE_ENTRY = frozenset(
    {
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EILSEQ,
        errno.EMLINK,
        errno.ELOOP,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EFBIG,
    }
)
_TYPES = {Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}


@dataclass(frozen=True, slots=True)
class Limits:
    """More than this is refused as a bomb."""

    entries: int = 10_000_000
    bytes: int = 1 << 40

    @property
    def plain_bytes(self) -> int:
        """Of the whole tar."""
        return self.bytes + self.entries * ENTRY_BYTES


@dataclass(slots=True)
class Applied:
    """What came out, and what only the layers below can tell."""

    size_bytes: int = 0
    inodes: int = 0
    # Directories that no entry describes, "" being the root: they take owner and mode from below.
    implicit: list[str] = field(default_factory=list)
    # (name, target) of hard links to files of layers below.
    links: list[tuple[str, str]] = field(default_factory=list)


class Applier:
    """One layer on its way into `tree`. Needs umask 0 and, for owners, devices and attributes, root."""

    def __init__(self, tree: Tree, *, bottom: bool, limits: Limits | None = None) -> None:
        """bottom: no layer lies below this one, so there is nothing to hide and no link can lead out."""
        self._tree = tree
        self._bottom = bottom
        self._limits = limits or Limits()
        self._directories: dict[str, Entry] = {}
        self._whiteouts: set[str] = set()
        self._opaque: set[str] = set()
        self._result = Applied()
        self._makers: dict[Kind, Callable[[Entry, list[str], int], None]] = {
            Kind.FILE: self._make_file,
            Kind.DIRECTORY: self._make_directory,
            Kind.SYMLINK: self._make_symlink,
            Kind.HARDLINK: self._make_hardlink,
            Kind.CHARACTER: self._make_node,
            Kind.BLOCK: self._make_node,
            Kind.FIFO: self._make_node,
        }

    def apply(self, reader: TarReader, on_entry: Callable[[], None] = lambda: None) -> Applied:
        """Raises BadLayer, and OSError for what the file system refuses."""
        self._reader = reader
        for count, entry in enumerate(reader):
            if count >= self._limits.entries:
                raise BadLayer(f"it has more than {self._limits.entries} entries")
            self._entry(entry)
            on_entry()
        self._finish()
        return self._result

    def _entry(self, entry: Entry) -> None:
        parts = components(entry.name)
        if not parts:
            self._root(entry)
            return
        if is_bookkeeping(entry, parts):
            return
        with _explained(entry):
            if parts[-1].startswith(WHITEOUT):
                self._whiteout(entry, parts)
            else:
                self._makers[entry.kind](entry, parts, self._tree.parent(parts))

    def _root(self, entry: Entry) -> None:
        if entry.kind is not Kind.DIRECTORY:
            raise BadLayer(f"entry {entry.shown} would replace the root directory")
        self._directories[""] = entry

    # What can be made

    def _make_file(self, entry: Entry, parts: list[str], parent: int) -> None:
        self._result.size_bytes += entry.size if entry.extents is None else sum(n for _, n in entry.extents)
        if self._result.size_bytes > self._limits.bytes:
            raise BadLayer(f"it unpacks to more than {self._limits.bytes} bytes")
        fd = self._create(lambda name, at: os.open(name, _NEW_FILE, entry.mode & 0o777, dir_fd=at), parts, parent)
        try:
            if entry.extents is None:
                _write_all(fd, self._reader.payload())
            else:
                for offset, length in entry.extents:
                    os.lseek(fd, offset, os.SEEK_SET)
                    _write_all(fd, self._reader.payload(length))
                os.ftruncate(fd, entry.size)
            if entry.uid or entry.gid:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.mode & ~0o777:
                os.fchmod(fd, entry.mode)
            if entry.xattrs:
                _set_xattrs(fd, entry)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _make_directory(self, entry: Entry, parts: list[str], parent: int) -> None:
        name, path = parts[-1], "/".join(parts)
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            self._result.inodes += 1
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                hidden = self._was_whiteout(path)
                self._tree.remove(name, parent)
                os.mkdir(name, 0o700, dir_fd=parent)
                if hidden:
                    self._opaque.add(path)
        self._tree.implicit.discard(path)
        self._directories.pop(path, None)
        self._directories[path] = entry

    def _make_symlink(self, entry: Entry, parts: list[str], parent: int) -> None:
        if not entry.link:
            raise BadLayer(f"entry {entry.shown} is a symbolic link to nothing")
        self._create(lambda name, at: os.symlink(os.fsdecode(entry.link), name, dir_fd=at), parts, parent)
        name = parts[-1]
        if entry.uid or entry.gid:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _make_hardlink(self, entry: Entry, parts: list[str], parent: int) -> None:
        target = components(entry.link)
        if not target:
            raise BadLayer(f"entry {entry.shown} is a hard link to a directory")
        if target == parts:
            return
        # Copies: looking for the target, or replacing what is there, may close what the tree has cached.
        with ExitStack() as fds:
            parent = _copy(parent, fds)
            found = self._tree.find_parent(target)
            if found is None or not _is_there(target[-1], found):
                self._link_below(entry, parts, target)
                return
            above = _copy(found, fds)
            status = os.stat(target[-1], dir_fd=above, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                raise BadLayer(f"entry {entry.shown} is a hard link to a directory")
            if _is_same(parts[-1], parent, status):  # by another path: to replace it would be to lose it
                return
            self._create(
                lambda name, at: os.link(target[-1], name, src_dir_fd=above, dst_dir_fd=at, follow_symlinks=False),
                parts,
                parent,
                counts=False,
            )

    def _link_below(self, entry: Entry, parts: list[str], target: list[str]) -> None:
        if self._bottom:
            raise BadLayer(f"entry {entry.shown} is a hard link to {entry.link[:200]!r}, which the layer does not have")
        self._result.links.append(("/".join(parts), "/".join(target)))

    def _make_node(self, entry: Entry, parts: list[str], parent: int) -> None:
        mode = _TYPES[entry.kind] | entry.mode
        device = os.makedev(*entry.device)
        self._create(lambda name, at: os.mknod(name, mode, device, dir_fd=at), parts, parent)
        name = parts[-1]
        if entry.uid or entry.gid:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
            os.chmod(name, entry.mode, dir_fd=parent)  # a device or FIFO, just made: no link to follow
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _create[T](self, make: Callable[[str, int], T], parts: list[str], parent: int, *, counts: bool = True) -> T:
        """Run `make`; if something of that name exists, replace it."""
        name = parts[-1]
        self._result.inodes += counts
        try:
            return make(name, parent)
        except FileExistsError:
            path = "/".join(parts)
            self._whiteouts.discard(path)
            self._directories.pop(path, None)
            self._tree.remove(name, parent)
            return make(name, parent)

    # What is hidden

    def _whiteout(self, entry: Entry, parts: list[str]) -> None:
        if parts[-1] == OPAQUE:
            self._opaque.add("/".join(parts[:-1]))
            self._tree.parent(parts)
            return
        name = parts[-1].removeprefix(WHITEOUT)
        if name in ("", ".", ".."):
            raise BadLayer(f"entry {entry.shown} hides no name that can exist")
        parts = [*parts[:-1], name]
        if self._bottom:
            return
        path = "/".join(parts)
        parent = self._tree.parent(parts)
        if not _is_there(name, parent):
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)
            self._whiteouts.add(path)
        elif path not in self._whiteouts and stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            self._opaque.add(path)  # removed below and made anew here

    def _was_whiteout(self, path: str) -> bool:
        was = path in self._whiteouts
        self._whiteouts.discard(path)
        return was

    # At the end

    def _finish(self) -> None:
        if not self._bottom:
            self._mark_opaque()
        # Deepest first: setting a directory's time must come after all that happens in it.
        for path, entry in sorted(self._directories.items(), key=lambda item: item[0].count("/"), reverse=True):
            self._finish_directory(path, entry)
        if not self._bottom:  # else there is nobody to ask what they look like
            self._result.implicit = sorted(self._tree.implicit)
            if "" not in self._directories:
                self._result.implicit.insert(0, "")
        self._result.inodes += len(self._tree.implicit)

    def _mark_opaque(self) -> None:
        for path in self._opaque:
            with self._directory(path) as fd:
                if fd is not None:
                    os.setxattr(fd, OPAQUE_XATTR, b"y")
        # Inside an opaque directory overlayfs takes a whiteout for an ordinary device and shows it.
        for path in self._whiteouts:
            if path.rpartition("/")[0] in self._opaque:
                parts = path.split("/")
                if (parent := self._tree.find_parent(parts)) is not None:
                    with suppress(FileNotFoundError):
                        os.unlink(parts[-1], dir_fd=parent)

    def _finish_directory(self, path: str, entry: Entry) -> None:
        with self._directory(path) as fd, _explained(entry):
            if fd is None:
                return
            if entry.uid or entry.gid:
                os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, entry.mode)
            _set_xattrs(fd, entry)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    @contextmanager
    def _directory(self, path: str) -> Iterator[int | None]:
        """The directory at `path`; None if later entries made something else of it."""
        parts = path.split("/") if path else ["."]
        parent = self._tree.find_parent(parts)
        try:
            if parent is None:
                raise FileNotFoundError
            fd = os.open(parts[-1], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)


def is_bookkeeping(entry: Entry, parts: list[str]) -> bool:
    """Whether it is aufs' own, which says nothing of what is in the layer. Names are looked through but seldom."""
    if _META not in entry.name or parts[-1] == OPAQUE:
        return False
    return any(part.startswith(WHITEOUT_META) for part in parts)


def _write_all(fd: int, views: Iterator[memoryview]) -> None:
    for view in views:
        while view:
            view = view[os.write(fd, view) :]


def _copy(fd: int, stack: ExitStack) -> int:
    copy = os.dup(fd)
    stack.callback(os.close, copy)
    return copy


def _is_same(name: str, parent: int, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(name, dir_fd=parent, follow_symlinks=False), status)
    except FileNotFoundError:
        return False


def _is_there(name: str, parent: int) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _set_xattrs(fd: int, entry: Entry) -> None:
    for name, value in entry.xattrs.items():
        wanted = (name.startswith(XATTR_PREFIXES) and not name.startswith(USER_OVERLAY)) or name in XATTR_NAMES
        if not wanted:
            continue
        try:
            os.setxattr(fd, name, value)
        except OSError as e:
            # user.* is a nicety that not every file system has; a lost capability would be a broken program.
            if e.errno != errno.ENOTSUP or not name.startswith(XATTR_PREFIXES):
                raise BadLayer(
                    f"entry {entry.shown}: attribute {os.fsdecode(name)[:80]!r} cannot be set: {e.strerror}"
                ) from e


@contextmanager
def _explained(entry: Entry) -> Iterator[None]:
    """Turn what the file system refuses because of the entry itself into a sentence that names it."""
    try:
        yield
    except OSError as e:
        if e.errno in _FAULTS_OF_THE_ENTRY:
            raise BadLayer(f"entry {entry.shown} cannot be made: {e.strerror}") from e
        if e.errno in (errno.EPERM, errno.EACCES):
            raise PermissionError(e.errno, f"entry {entry.shown} cannot be made: {e.strerror}") from e
        raise
