"""Files of a container as a tar: a process of its own goes where the container is, and reads or writes them there.

    fd 0   {"op": "out", "path": P, "follow": false, "data": true, WHERE}     or
           {"op": "in", "path": DIRECTORY, "keep_ids": true, WHERE}           in one line; then the tar
    fd 1   out: {"name": …, "size": …, "mode": …, "mtime_ns": …, "link_target": …} in one line; then the tar
    fd 2   {"error": KIND, "message": …} in one line, if it went wrong; then the status is 1

    WHERE  "namespace": FD, the mount namespace of one that has a process; or, of one that has none, what a root is made
           of in a namespace of this process's own: "bundle": DIRECTORY, "rootfs", "parts" and "binds": [MOUNT, …],
           "read_only": false

Whatever is in there is hostile. So no path is resolved before this process sees nothing else than the container does;
by then all that is needed is loaded and nothing can be any more, and names of users are not looked up (CVE-2019-14271).
It can't be traced from inside. Symbolic links lead where they lead inside, as for the container's own programs.
"""
# Paths are the container's, as the kernel takes them.
# ruff: noqa: PTH101, PTH102, PTH103, PTH108, PTH112, PTH115, PTH116, PTH119, PTH120, PTH208, PTH211

import contextlib
import errno
import json
import os
import stat
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, BinaryIO, NoReturn

from corral.kernel import namespaces, process
from corral.kernel.namespaces import Kind
from corral.oci import OCI_VERSION, init
from corral.oci.blueprint import plan_of
from corral.oci.imports import close_imports
from corral.oci.mounts import BindMount, ReadonlyRoot, RootFilesystem
from corral.oci.parts import make_parts
from corral.oci.spec import Linux, Mount, Namespace, Process, Root, Spec

CHUNK = 256 << 10
_STEPS = (RootFilesystem, BindMount, ReadonlyRoot)
_XATTR = "SCHILY.xattr."
_COPIED_XATTRS = ("user.", "security.capability")
_KINDS = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.EEXIST: "failed_precondition",
    errno.EISDIR: "failed_precondition",
    errno.EROFS: "failed_precondition",
    errno.ENOSPC: "resource_exhausted",
    errno.EDQUOT: "resource_exhausted",
}


class Refused(Exception):
    """What can't be done, by whose fault it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def main() -> NoReturn:
    """Do the one job. Started as `python -I -S -c …`, with nothing else open but what the job names."""
    try:
        job = json.loads(sys.stdin.buffer.readline())
        _enter(job)
        if job["op"] == "out":
            _copy_out(job, sys.stdout.buffer)
        else:
            _copy_in(job, sys.stdin.buffer)
        sys.stdout.buffer.flush()
    except BaseException as e:  # noqa: BLE001 - the last frame of this process
        with contextlib.suppress(OSError):
            os.write(2, json.dumps(_described(e)).encode() + b"\n")
        os._exit(1)
    os._exit(0)


def _described(e: BaseException) -> Mapping[str, str]:
    if isinstance(e, Refused):
        return {"error": e.kind, "message": str(e)}
    if isinstance(e, tarfile.TarError | EOFError | zlib.error):
        return {"error": "invalid_argument", "message": f"this is no tar, or not a whole one: {e}"}
    if isinstance(e, OSError):
        where = f"{e.filename}: " if e.filename else ""
        return {"error": _KINDS.get(e.errno or 0, "internal"), "message": f"{where}{(e.strerror or str(e)).lower()}"}
    return {"error": "internal", "message": f"{type(e).__name__}: {e}"}


# Going there


def _enter(job: Mapping[str, object]) -> None:
    process.set_dumpable(False)
    tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]  # the C library would look in the container
    "".encode("utf-8", "surrogateescape")
    fd = job.get("namespace")
    if isinstance(fd, int):
        close_imports()
        namespaces.join(fd, Kind.MOUNT.flag, what="the container's mount namespace")
        os.close(fd)
    else:
        _make_root(job)
    os.chdir("/")
    os.umask(0)


def _make_root(job: Mapping[str, object]) -> None:
    """The root as it will be at the next start, but for what is made anew each time."""
    rootfs, binds = _mounts(job["rootfs"]), _mounts(job["binds"])
    spec = Spec(
        oci_version=OCI_VERSION,
        root=Root(path="rootfs", readonly=bool(job.get("read_only"))),
        process=Process(cwd="/", args=("copying",)),
        mounts=tuple(binds),
        linux=Linux(namespaces=(Namespace(Kind.MOUNT),)),
    )
    plan = plan_of(spec, bundle=str(job["bundle"]), rootfs=rootfs, user=None, cgroups=[], console_size=None)
    plan = replace(plan, steps=tuple(step for step in plan.steps if isinstance(step, _STEPS)))
    with contextlib.ExitStack() as stack:
        parts = make_parts(_mounts(job.get("parts", ())), stack)
        namespaces.leave(Kind.MOUNT.flag)
        close_imports()
        stage = init.build_root(plan, init.Way(parts=parts))
    os.close(stage.root)


def _mounts(given: object) -> Sequence[Mount]:
    assert isinstance(given, Sequence)
    return [
        Mount(each["target"], each["type"], each["source"], tuple(each["options"]))  # in the words of corral.shim
        for each in given
    ]


# Out


@dataclass(slots=True)
class _Found:
    """One file on its way into the tar."""

    path: str
    name: str
    status: os.stat_result


def _copy_out(job: Mapping[str, object], out: BinaryIO) -> None:
    asked = str(job["path"])
    path = os.path.normpath(f"/{asked}")
    if job.get("follow") or asked.endswith(("/", "/.")):
        path = os.path.realpath(path, strict=True)
    status = os.lstat(path)
    if asked.endswith(("/", "/.")) and not stat.S_ISDIR(status.st_mode):
        raise Refused("invalid_argument", f"{asked}: not a directory")
    name = os.path.basename(path) or "."
    link = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
    header = {
        "name": name,
        "size": status.st_size,
        "mode": status.st_mode,
        "mtime_ns": status.st_mtime_ns,
        "link_target": link,
    }
    out.write(json.dumps(header).encode() + b"\n")
    if not job.get("data"):
        return
    out.flush()
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as tar:
        first: dict[tuple[int, int], str] = {}
        for found in _walk(path, name, status):
            _add(tar, found, first)


def _walk(path: str, name: str, status: os.stat_result) -> Iterator[_Found]:
    """It and all that is below, parents first, in the order of names. What goes meanwhile is left out."""
    waiting = [_Found(path, name, status)]
    while waiting:
        found = waiting.pop()
        yield found
        if not stat.S_ISDIR(found.status.st_mode):
            continue
        try:
            names = sorted(os.listdir(found.path), reverse=True)
        except FileNotFoundError:
            continue
        for each in names:
            below = f"{found.path.rstrip('/')}/{each}"
            with contextlib.suppress(FileNotFoundError):
                waiting.append(_Found(below, f"{found.name}/{each}", os.lstat(below)))


def _add(tar: tarfile.TarFile, found: _Found, first: dict[tuple[int, int], str]) -> None:
    status, info = found.status, tarfile.TarInfo(found.name)
    info.mode, info.uid, info.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    info.mtime = status.st_mtime
    inode = (status.st_dev, status.st_ino)
    if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
        if inode in first:
            info.type, info.linkname = tarfile.LNKTYPE, first[inode]
            tar.addfile(info)
            return
        first[inode] = found.name
    if stat.S_ISREG(status.st_mode):
        _add_file(tar, found, info)
        return
    if stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        info.type = tarfile.SYMTYPE
        info.linkname = os.readlink(found.path)
    elif stat.S_ISFIFO(status.st_mode):
        info.type = tarfile.FIFOTYPE
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        info.type = tarfile.CHRTYPE if stat.S_ISCHR(status.st_mode) else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    else:  # a socket
        return
    tar.addfile(info)


def _add_file(tar: tarfile.TarFile, found: _Found, info: tarfile.TarInfo) -> None:
    try:  # not to wait for a writer, should it be a FIFO by now
        fd = os.open(found.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return
        info.size = status.st_size
        names = [name for name in os.listxattr(fd) if name.startswith(_COPIED_XATTRS)]
        info.pax_headers = {f"{_XATTR}{n}": os.getxattr(fd, n).decode("utf-8", "surrogateescape") for n in names}
        tar.addfile(info, _Whole(file, info.size))


class _Whole:
    """A file that is as long as was said, whatever is written to it meanwhile."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def read(self, most: int = CHUNK, /) -> bytes:
        wanted = min(most, self._left)
        data = self._file.read(wanted)
        self._left -= wanted
        return data + bytes(wanted - len(data))


# In


def _copy_in(job: Mapping[str, object], source: BinaryIO) -> None:
    directory = str(job["path"])
    try:
        directory = os.path.realpath(f"/{directory}", strict=True)
    except FileNotFoundError:
        raise Refused("not_found", f"{directory}: no such directory") from None
    if not os.path.isdir(directory):
        raise Refused("failed_precondition", f"{directory}: not a directory")
    os.chdir(directory)
    times: list[tuple[str, float]] = []
    with tarfile.open(fileobj=source, mode="r|*", bufsize=CHUNK) as tar:
        for member in tar:
            name = _inside(member.name)
            _put(tar, member, name, keep_ids=bool(job.get("keep_ids")))
            if member.isdir():
                times.append((name, member.mtime))
    for name, mtime in reversed(times):
        os.utime(name, (mtime, mtime))
    while source.read(CHUNK):  # whoever sends it is to see it taken
        pass


def _inside(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Refused("invalid_argument", f"the archive's entry {name!r} leads out of the directory")
    return "/".join(parts) or "."


def _put(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, *, keep_ids: bool) -> None:
    above = os.path.dirname(name)
    if above:
        os.makedirs(above, 0o755, exist_ok=True)
    _make_way(member, name)
    if member.isreg():
        _put_file(tar, member, name)
    elif member.isdir():
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700)
    elif member.issym():
        os.symlink(member.linkname, name)
    elif member.islnk():
        os.link(_inside(member.linkname), name, follow_symlinks=False)
        return
    elif member.isfifo():
        os.mkfifo(name, 0o600)
    elif member.ischr() or member.isblk():
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        os.mknod(name, kind | 0o600, os.makedev(member.devmajor, member.devminor))
    else:
        raise Refused("invalid_argument", f"the archive's entry {member.name!r} is of a kind that is not known")
    uid, gid = (member.uid, member.gid) if keep_ids else (0, 0)
    os.chown(name, uid, gid, follow_symlinks=False)
    if member.issym():
        return
    os.chmod(name, member.mode & 0o7777)
    for key, value in member.pax_headers.items():
        if key.startswith(_XATTR) and key.removeprefix(_XATTR).startswith(_COPIED_XATTRS):
            os.setxattr(name, key.removeprefix(_XATTR), value.encode("utf-8", "surrogateescape"))
    if not member.isdir():
        os.utime(name, (member.mtime, member.mtime))


def _make_way(member: tarfile.TarInfo, name: str) -> None:
    """Remove what is there, but for a directory; neither takes the place of the other."""
    try:
        status = os.lstat(name)
    except FileNotFoundError:
        return
    if member.isdir() and stat.S_ISLNK(status.st_mode):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name)
    if stat.S_ISDIR(status.st_mode) != member.isdir():
        kinds = ("a directory", "no directory") if member.isdir() else ("no directory", "a directory")
        raise Refused("failed_precondition", f"{name}: is {kinds[1]} and cannot be overwritten by {kinds[0]}")
    if not member.isdir():
        os.unlink(name)


def _put_file(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
    source = tar.extractfile(member)
    assert source is not None
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with source, open(fd, "wb", buffering=0) as file:
        while data := source.read(CHUNK):
            file.write(data)
