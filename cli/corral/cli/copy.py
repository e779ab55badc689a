"""`corral cp`: files between a container and this host, with docker's rules for what goes where.

What a container sends is not trusted: nothing is written outside of the destination.
"""

import io
import os
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
    for member in tar:
        renamed = _renamed(member.name, root, name)
        if renamed is None:
            raise ValueError(f"the container sent {member.name!r}, which is not below what was asked for")
        if member.islnk():
            member.linkname = _renamed(member.linkname, root, name) or ""
        if not renamed:  # the directory whose contents were asked for
            continue
        member.name = renamed
        target = place / renamed
        if not member.isdir() and (target.is_symlink() or target.is_file()):
            target.unlink()
        if not (keep_ids and os.geteuid() == 0):
            member = member.replace(uid=os.geteuid(), gid=os.getegid(), uname="", gname="", deep=False)
        tar.extract(member, place, numeric_owner=True, filter=_as_it_is)


def _as_it_is(member: tarfile.TarInfo, place: str) -> tarfile.TarInfo:
    """All kinds of files, with all their permissions, but none outside. Raises tarfile.FilterError."""
    checked = tarfile.tar_filter(member, place)
    return checked.replace(mode=member.mode, deep=False)


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
    """As _destination(), the other way round."""
    from corral.rpc.errors import NotFound

    try:
        found = next(iter(app.client.containers.copy_from(container, path, follow_link=True, stat_only=True))).stat
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
