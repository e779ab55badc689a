"""`corral cp`: files between a container and this host, with docker's rules for what goes where.

What a container sends is not trusted: nothing is written outside of the destination, whatever links it has had put
there before.
"""
# ruff: noqa: PTH119, PTH120

import contextlib
import io
import os
import posixpath
import stat
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from corral.cli.app import App, pass_app

if TYPE_CHECKING:
    from corral.api.engine.v1 import engine_pb2

STANDARD = "-"
CHUNK = 256 << 10
_MOST_LINKS = 40  # as the kernel follows
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@click.command("cp")
@click.option("-a", "--archive", "keep_ids", is_flag=True, help="Keep the user and group ids")
@click.option("-L", "--follow-link", is_flag=True, help="Copy what a symbolic link SOURCE leads to")
@click.option("-q", "--quiet", is_flag=True, expose_value=False, help="Say nothing, which is the default")
@click.argument("source")
@click.argument("target")
@pass_app
def cp_command(app: App, source: str, target: str, keep_ids: bool, follow_link: bool) -> None:
    """Copy files or directories between a container and this host.

    One of SOURCE and TARGET is CONTAINER:PATH, the other a path of this host, or - for a tar on stdin or stdout.
    SOURCE/. is what is in a directory.
    """
    (there, inner), (elsewhere, outer) = _split(source), _split(target)
    if bool(there) == bool(elsewhere):
        raise click.UsageError("one of SOURCE and TARGET must be CONTAINER:PATH, and the other a path of this host")
    if there:
        _copy_out(app, there, inner, target, follow=follow_link, keep_ids=keep_ids)
    else:
        _copy_in(app, source, elsewhere, outer, follow=follow_link, keep_ids=keep_ids)


def _split(text: str) -> tuple[str, str]:
    """The container, if one is named, and the path. A path with a colon is written ./a:b or /a:b."""
    container, colon, path = text.partition(":")
    if not colon or text.startswith(("/", ".")) or text == STANDARD:
        return "", text
    return container, path


# Out


def _copy_out(app: App, container: str, path: str, target: str, *, follow: bool, keep_ids: bool) -> None:
    parts = app.client.containers.copy_from(container, path, follow_link=follow)
    found = next(iter(parts)).stat
    data = (part.data for part in parts)
    if target == STANDARD:
        if sys.stdout.isatty():
            raise ValueError("a tar is not for a terminal: send stdout to a file or a pipe")
        for chunk in data:
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        return
    place, name = _destination(found, path, target)
    with tarfile.open(fileobj=Stream(data), mode="r|", bufsize=CHUNK) as tar:
        _unpack(tar, found.name, place, name, keep_ids=keep_ids)


def _destination(found: "engine_pb2.PathStat", path: str, target: str) -> tuple[Path, str]:
    """The directory to write in, and what the root of the tar is called there; "" for its contents alone."""
    is_directory, there = stat.S_ISDIR(found.mode), Path(target)
    if there.is_dir():
        contents = is_directory and path.endswith("/.")
        return there, "" if contents else "." if found.name == "." else found.name
    if there.exists() and is_directory:
        raise ValueError(f"{target} is no directory: a directory cannot be copied over it")
    if not is_directory and target.endswith("/"):
        raise ValueError(f"{target} does not exist: make the directory, or name a file")
    if not there.parent.is_dir():
        raise ValueError(f"{there.parent} does not exist: make the directory first")
    return there.parent, there.name


def _unpack(tar: tarfile.TarFile, root: str, place: Path, name: str, *, keep_ids: bool) -> None:
    top = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for member in tar:
            renamed = _renamed(member.name, root, name)
            linked = _renamed(member.linkname, root, name) if member.islnk() else ""
            if renamed is None or linked is None:
                raise ValueError(f"the container sent {member.name!r}, which is not below what was asked for")
            if renamed not in ("", "."):  # the directory whose contents were asked for
                _put(tar, member, top, renamed, linked, keep_ids=keep_ids and os.geteuid() == 0)
    finally:
        os.close(top)


def _put(tar: tarfile.TarFile, member: tarfile.TarInfo, top: int, path: str, linked: str, *, keep_ids: bool) -> None:
    """Write one entry. On the way to it no link is followed: those below the destination may be the container's."""
    above, name = _opened(top, os.path.dirname(path)), os.path.basename(path)
    try:
        _make_way(member, above, name, path)
        mode = member.mode & (0o7777 if keep_ids else 0o777)
        if member.isreg():
            _put_file(tar, member, above, name, mode, keep_ids=keep_ids)
            return
        elif member.isdir():
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=above)
            fd = os.open(name, _DIRECTORY, dir_fd=above)
            try:
                os.fchmod(fd, mode | 0o700 * (os.geteuid() != 0))  # who is not root is to write in it
            finally:
                os.close(fd)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=above)
        elif member.islnk():
            there = _opened(top, os.path.dirname(linked))
            try:
                os.link(
                    os.path.basename(linked), name, src_dir_fd=there, dst_dir_fd=above, follow_symlinks=False
                )  # fmt: skip
            finally:
                os.close(there)
            return
        elif member.isfifo():
            os.mkfifo(name, mode, dir_fd=above)
        else:
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(name, kind | mode, os.makedev(member.devmajor, member.devminor), dir_fd=above)
        if keep_ids:
            os.chown(name, member.uid, member.gid, dir_fd=above, follow_symlinks=False)
        os.utime(name, (member.mtime, member.mtime), dir_fd=above, follow_symlinks=False)
    finally:
        os.close(above)


def _opened(top: int, path: str) -> int:
    """A directory below the destination, made if it is missing. Raises ValueError for a link in the way."""
    at = os.dup(top)
    for name in filter(None, path.split("/")):
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=at)
            below = os.open(name, _DIRECTORY, dir_fd=at)
        except OSError as e:
            raise ValueError(f"{path}: {name} is in the way, and no directory ({e.strerror}): remove it first") from e
        finally:
            os.close(at)
        at = below
    return at


def _make_way(member: tarfile.TarInfo, above: int, name: str, path: str) -> None:
    """Remove what is there, but for a directory; neither takes the place of the other."""
    try:
        status = os.stat(name, dir_fd=above, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode) != member.isdir():
        raise ValueError(f"{path} is there, and is {'no ' * member.isdir()}directory: remove it first")
    if not member.isdir():
        os.unlink(name, dir_fd=above)


def _put_file(
    tar: tarfile.TarFile, member: tarfile.TarInfo, above: int, name: str, mode: int, *, keep_ids: bool
) -> None:
    source = tar.extractfile(member)
    assert source is not None
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=above)
    with source, open(fd, "wb", buffering=0) as file:
        while data := source.read(CHUNK):
            file.write(data)
        if keep_ids:
            os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, mode)
        os.utime(fd, (member.mtime, member.mtime))


def _renamed(name: str, root: str, new: str) -> str | None:
    """A name of the tar under another root; None if it is not below that."""
    if name == root:
        return new
    below = name.removeprefix(f"{root}/")
    if below == name or ".." in below.split("/"):
        return None
    return f"{new}/{below}" if new else below


class Stream(io.RawIOBase):
    """Chunks that arrive, as a file to read from."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, most: int = -1, /) -> bytes:
        """At most so many bytes, none at the end."""
        while len(self._rest) < most:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._rest += chunk
        data, self._rest = self._rest[:most], self._rest[most:]
        return data


# In


def _copy_in(app: App, source: str, container: str, path: str, *, follow: bool, keep_ids: bool) -> None:
    from corral.rpc.errors import CorralError

    containers = app.client.containers
    if source == STANDARD:
        containers.copy_to(container, path, iter(lambda: sys.stdin.buffer.read(CHUNK), b""), as_root=False)
        return
    where = Path(source)
    if follow and where.is_symlink():
        where = where.resolve(strict=True)
    status = where.stat() if source.endswith(("/", "/.")) else where.lstat()
    directory, name = _place_inside(app, container, path, source, is_directory=stat.S_ISDIR(status.st_mode))
    tar = _Packed(where, name)
    try:
        containers.copy_to(container, directory, tar, as_root=not keep_ids)
    except CorralError as e:  # which may be but the consequence
        raise e if tar.failure is None or isinstance(tar.failure, BrokenPipeError) else tar.failure from None
    if tar.failure is not None:
        raise tar.failure


def _place_inside(app: App, container: str, path: str, source: str, *, is_directory: bool) -> tuple[str, str]:
    """As _destination(), the other way round; but what is a link there is followed, inside the container."""
    from corral.rpc.errors import NotFound

    try:
        path, found = _end_of_links(app, container, path)
    except NotFound as e:
        above, _, name = path.rstrip("/").rpartition("/")
        if not is_directory and path.endswith("/"):
            raise NotFound(f"{e}: make the directory, or name a file") from None
        return above or "/", name
    if stat.S_ISDIR(found.mode):
        return path, "" if is_directory and source.endswith("/.") else Path(source).resolve().name
    if is_directory:
        raise ValueError(f"{path} of the container is no directory: a directory cannot be copied over it")
    above, _, name = path.rpartition("/")
    return above or "/", name


def _end_of_links(app: App, container: str, path: str) -> "tuple[str, engine_pb2.PathStat]":
    """What a path of the container leads to: where that is, unless it is a directory, and what.

    Raises NotFound, also for a link that leads nowhere.
    """
    stats = app.client.containers.copy_from
    found = next(iter(stats(container, path, follow_link=True, stat_only=True))).stat
    for _ in range(_MOST_LINKS if not stat.S_ISDIR(found.mode) else 0):
        link = next(iter(stats(container, path, stat_only=True))).stat
        if not stat.S_ISLNK(link.mode):
            break
        path = posixpath.join(posixpath.dirname(path), link.link_target)
    return path, found


class _Packed:
    """A tar of a path of this host, as it is written on another thread."""

    def __init__(self, where: Path, name: str) -> None:
        self._where, self._name = where, name
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[bytes]:
        import threading

        read_end, write_end = os.pipe()
        with open(read_end, "rb", buffering=0) as reading:
            threading.Thread(target=self._write, args=(write_end,), daemon=True).start()
            while chunk := reading.read(CHUNK):
                yield chunk

    def _write(self, fd: int) -> None:
        try:
            with open(fd, "wb") as file:
                _pack(self._where, self._name, file)
        except BaseException as e:  # noqa: BLE001 - told by whoever reads
            self.failure = e


def _pack(where: Path, name: str, file: BinaryIO) -> None:
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as tar:
        if name:
            tar.add(where, name)
            return
        for below in sorted(where.iterdir()):
            tar.add(below, below.name)
