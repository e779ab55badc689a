"""Files of a container as a tar: a process of its own goes where the container is, and reads or writes them there.

    fd 0   {"op": "out", "path": P, "follow": false, "data": true, WHERE}     or
           {"op": "in", "path": DIRECTORY, "keep_ids": true, WHERE}           in one line; then the tar
    fd 1   out: {"name": …, "size": …, "mode": …, "mtime_ns": …, "link_target": …} in one line; then the tar
    fd 2   {"error": KIND, "message": …} in one line, if it went wrong; then the status is 1

    WHERE  "namespace": FD, the mount namespace of one that has a process; or, of one that has none, what a root is made
           of in a namespace of this process's own: "bundle": DIRECTORY, "rootfs", "parts" and "binds": [MOUNT, …],
           "images": [{"target": …, "tree": MOUNT, "subpath": …, "writable": …}, …], "read_only": false

Whatever is in there is hostile. So no path is resolved before this process sees nothing else than the container does;
by then all that is needed is loaded and nothing can be any more, and names of users are not looked up (CVE-2019-14271).
It can't be traced from inside. Symbolic links lead where they lead inside, but the kernel's own ones, in a procfs that
may be the host's (`--pid host`), lead nowhere; and no name is looked up twice.
"""
# Paths are the container's, as the kernel takes them.
# ruff: noqa: PTH119, PTH120

import contextlib
import errno
import json
import os
import stat
import sys
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, BinaryIO, NoReturn

from corral.kernel import namespaces, paths, process
from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import PROC_SUPER_MAGIC, SYSFS_MAGIC, filesystem_magic
from corral.oci import OCI_VERSION, init
from corral.oci.blueprint import plan_of
from corral.oci.errors import ExecFailed
from corral.oci.image_mounts import ImageMount
from corral.oci.imports import close_imports
from corral.oci.mounts import BindMount, ReadonlyRoot, RootFilesystem
from corral.oci.parts import make_parts
from corral.oci.spec import Linux, Mount, Namespace, Process, Root, Spec

CHUNK = 256 << 10
_STEPS = (RootFilesystem, BindMount, ImageMount, ReadonlyRoot)
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
    if isinstance(e, ExecFailed):
        return {"error": "failed_precondition", "message": e.message}
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
    plan = plan_of(
        spec,
        bundle=str(job["bundle"]),
        rootfs=rootfs,
        user=None,
        cgroups=[],
        console_size=None,
        images=_images(job["images"]),
    )
    plan = replace(plan, steps=tuple(step for step in plan.steps if isinstance(step, _STEPS)))
    with contextlib.ExitStack() as stack:
        parts = make_parts(_mounts(job.get("parts", ())), stack)
        namespaces.leave(Kind.MOUNT.flag)
        close_imports()
        stage = init.build_root(plan, init.Way(parts=parts))
    os.close(stage.root)


def _mounts(given: object) -> Sequence[Mount]:
    assert isinstance(given, Sequence)
    return [_mount(each) for each in given]


def _mount(given: Mapping[str, Any]) -> Mount:
    return Mount(
        given["target"], given["type"], given["source"], tuple(given["options"])
    )  # in the words of corral.shim


def _images(given: object) -> Sequence[ImageMount]:
    assert isinstance(given, Sequence)
    return [
        ImageMount.of(each["target"], _mount(each["tree"]), subpath=each["subpath"], writable=each["writable"])
        for each in given
    ]


# Out


@dataclass(slots=True)
class _Found:
    """One file on its way into the tar: where it is, what it is called there and in the tar, and what it is."""

    above: int
    called: str
    name: str
    status: os.stat_result


def _absolute(path: str) -> str:
    return os.path.normpath("/" + path.lstrip("/"))  # which would leave a second slash


def _copy_out(job: Mapping[str, object], out: BinaryIO) -> None:
    asked, root = str(job["path"]), os.open("/", os.O_PATH | os.O_DIRECTORY)
    path, inside = _absolute(asked), asked.endswith(("/", "/."))
    flags = os.O_PATH | (0 if job.get("follow") or inside else os.O_NOFOLLOW)
    fd = _located(root, path, flags)
    status = os.fstat(fd)
    if inside and not stat.S_ISDIR(status.st_mode):
        raise Refused("invalid_argument", f"{asked}: not a directory")
    name = os.path.basename(path) or "."
    header = {
        "name": name,
        "size": status.st_size,
        "mode": status.st_mode,
        "mtime_ns": status.st_mtime_ns,
        "link_target": os.readlink("", dir_fd=fd) if stat.S_ISLNK(status.st_mode) else "",
    }
    out.write(json.dumps(header).encode() + b"\n")
    if not job.get("data"):
        return
    out.flush()
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as tar:
        first: dict[tuple[int, int], str] = {}
        if stat.S_ISDIR(status.st_mode):
            directory = _located(root, path, os.O_RDONLY | os.O_DIRECTORY)
            _add(tar, _Found(directory, ".", name, os.fstat(directory)), first)
            _add_below(tar, directory, name, first)
        elif flags & os.O_NOFOLLOW:
            above = _located(root, os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
            _add(tar, _Found(above, os.path.basename(path), name, status), first)
        else:
            file = _located(root, path, os.O_RDONLY | os.O_NONBLOCK)
            _add_file(tar, file, tarfile.TarInfo(name))


def _located(root: int, path: str, flags: int) -> int:
    try:
        return paths.open_in_root(root, path, flags)
    except OSError as e:
        raise OSError(e.errno, os.strerror(e.errno or 0), path) from e


def _add_below(tar: tarfile.TarFile, top: int, name: str, first: dict[tuple[int, int], str]) -> None:
    """All that is in a directory, parents first, in the order of names. What goes meanwhile is left out."""
    waiting = [(top, name, _names(top))]
    while waiting:
        directory, above, names = waiting[-1]
        if not names:
            os.close(directory)
            waiting.pop()
            continue
        called = names.pop()
        try:
            status = os.stat(called, dir_fd=directory, follow_symlinks=False)
            found = _Found(directory, called, f"{above}/{called}", status)
            _add(tar, found, first)
            if stat.S_ISDIR(status.st_mode):
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                below = os.open(called, flags, dir_fd=directory)
                waiting.append((below, found.name, _names(below)))
        except FileNotFoundError:
            continue


def _names(directory: int) -> list[str]:
    """The last one first; none of what is but the kernel's voice."""
    if filesystem_magic(directory) in (PROC_SUPER_MAGIC, SYSFS_MAGIC):
        return []
    return sorted(os.listdir(directory), reverse=True)


def _add(tar: tarfile.TarFile, found: _Found, first: dict[tuple[int, int], str]) -> None:
    status, info = found.status, tarfile.TarInfo(found.name)
    inode = (status.st_dev, status.st_ino)
    if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
        if inode in first:
            _describe(info, status)
            info.type, info.linkname = tarfile.LNKTYPE, first[inode]
            _put_in(tar, info)
            return
        first[inode] = found.name
    if stat.S_ISREG(status.st_mode):
        # Not to wait for a writer, should it be a FIFO by now.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        _add_file(tar, os.open(found.called, flags, dir_fd=found.above), info)
        return
    _describe(info, status)
    if stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        info.type = tarfile.SYMTYPE
        info.linkname = os.readlink(found.called, dir_fd=found.above)
    elif stat.S_ISFIFO(status.st_mode):
        info.type = tarfile.FIFOTYPE
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        info.type = tarfile.CHRTYPE if stat.S_ISCHR(status.st_mode) else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    else:  # a socket
        return
    _put_in(tar, info)


def _describe(info: tarfile.TarInfo, status: os.stat_result) -> None:
    info.mode, info.uid, info.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    info.mtime = status.st_mtime


def _add_file(tar: tarfile.TarFile, fd: int, info: tarfile.TarInfo) -> None:
    """A regular file; what else it has become meanwhile is left out."""
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return
        _describe(info, status)
        info.size = status.st_size
        names = [name for name in os.listxattr(fd) if name.startswith(_COPIED_XATTRS)]
        info.pax_headers = {f"{_XATTR}{n}": os.getxattr(fd, n).decode("utf-8", "surrogateescape") for n in names}
        _put_in(tar, info, _Whole(file, info.size))


def _put_in(tar: tarfile.TarFile, info: tarfile.TarInfo, data: "_Whole | None" = None) -> None:
    tar.addfile(info, data)
    tar.members.clear()  # type: ignore[attr-defined]  # else it would remember millions


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
    place = _absolute(str(job["path"]))
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        os.close(paths.open_in_root(root, place, os.O_PATH | os.O_DIRECTORY))
    except FileNotFoundError:
        raise Refused("not_found", f"{place}: no such directory") from None
    except NotADirectoryError:
        raise Refused("failed_precondition", f"{place}: not a directory") from None
    times: list[tuple[str, float]] = []
    with tarfile.open(fileobj=source, mode="r|*", bufsize=CHUNK) as tar:
        for member in tar:
            name = _inside(member.name)
            if name:
                _put(tar, member, root, f"{place}/{name}", place, keep_ids=bool(job.get("keep_ids")))
                if member.isdir():
                    times.append((f"{place}/{name}", member.mtime))
            tar.members.clear()  # type: ignore[attr-defined]
    for path, mtime in reversed(times):
        with paths.opened(_parent(root, path)) as above:
            os.utime(os.path.basename(path), (mtime, mtime), dir_fd=above, follow_symlinks=False)
    while source.read(CHUNK):  # whoever sends it is to see it taken
        pass


def _inside(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Refused("invalid_argument", f"the archive's entry {name!r} leads out of the directory")
    return "/".join(parts)


def _parent(root: int, path: str) -> int:
    """The directory that a path is in, made if it is missing."""
    return paths.make_directory_in_root(root, os.path.dirname(path))


def _put(tar: tarfile.TarFile, member: tarfile.TarInfo, root: int, path: str, place: str, *, keep_ids: bool) -> None:
    uid, gid = (member.uid, member.gid) if keep_ids else (0, 0)
    mode, name = member.mode & 0o7777, os.path.basename(path)
    with paths.opened(_parent(root, path)) as above:
        _make_way(member, above, name)
        if member.isreg():
            _put_file(tar, member, above, name, uid, gid)
            return
        if member.isdir():
            _put_directory(member, above, name, uid, gid)
            return
        if member.islnk():
            linked = f"{place}/{_inside(member.linkname)}"
            with paths.opened(paths.open_in_root(root, os.path.dirname(linked), os.O_PATH | os.O_DIRECTORY)) as there:
                os.link(
                    os.path.basename(linked), name, src_dir_fd=there, dst_dir_fd=above, follow_symlinks=False
                )  # fmt: skip
            return
        if member.issym():
            os.symlink(member.linkname, name, dir_fd=above)
        elif member.isfifo():
            os.mkfifo(name, mode, dir_fd=above)
        elif member.ischr() or member.isblk():
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(name, kind | mode, os.makedev(member.devmajor, member.devminor), dir_fd=above)
        else:
            raise Refused("invalid_argument", f"the archive's entry {member.name!r} is of a kind that is not known")
        os.chown(name, uid, gid, dir_fd=above, follow_symlinks=False)
        os.utime(name, (member.mtime, member.mtime), dir_fd=above, follow_symlinks=False)


def _make_way(member: tarfile.TarInfo, above: int, name: str) -> None:
    """Remove what is there, but for a directory; neither takes the place of the other. A link is no directory."""
    try:
        status = os.stat(name, dir_fd=above, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode) != member.isdir():
        kinds = ("a directory", "no directory") if member.isdir() else ("no directory", "a directory")
        raise Refused("failed_precondition", f"{name}: is {kinds[1]} and cannot be overwritten by {kinds[0]}")
    if not member.isdir():
        os.unlink(name, dir_fd=above)


def _put_directory(member: tarfile.TarInfo, above: int, name: str, uid: int, gid: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=above)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with paths.opened(os.open(name, flags, dir_fd=above)) as fd:
        _dress(member, fd, uid, gid)


def _put_file(tar: tarfile.TarFile, member: tarfile.TarInfo, above: int, name: str, uid: int, gid: int) -> None:
    source = tar.extractfile(member)
    assert source is not None
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=above)
    with source, open(fd, "wb", buffering=0) as file:
        while data := source.read(CHUNK):
            file.write(data)
        _dress(member, fd, uid, gid)
        os.utime(fd, (member.mtime, member.mtime))


def _dress(member: tarfile.TarInfo, fd: int, uid: int, gid: int) -> None:
    os.fchown(fd, uid, gid)
    os.fchmod(fd, member.mode & 0o7777)
    for key, value in member.pax_headers.items():
        name = key.removeprefix(_XATTR)
        if name != key and name.startswith(_COPIED_XATTRS):
            os.setxattr(fd, name, value.encode("utf-8", "surrogateescape"))
