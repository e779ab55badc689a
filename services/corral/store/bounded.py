"""Directories that hold no more than so many bytes, by whatever their file system can do for that.

    project   ext4 and xfs that count projects: the directory is one, with a limit
    image     anywhere: the directory is a file system of its own, in a file of that size, which has to be mounted

Source: corral.kernel.project_quota; mke2fs(8).
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from corral.kernel import project_quota
from corral.kernel.project_quota import ProjectUsage

MIN_IMAGE_BYTES = 4 << 20
MAX_IMAGE_BYTES = (16 << 40) - 4096
"""What the largest file of an ext4 can hold."""
IMAGE_TYPE = "ext4"
IMAGE_OPTIONS = ("loop", "discard")  # what is deleted inside gives its room back
_EMPTY = "user.corral.empty"
# Nothing kept for root; and what a new file reads as zeros anyhow is not written, neither now nor once it is mounted.
_MKFS_OPTIONS = ("-q", "-F", "-m", "0")
_IN_A_FILE = ("-E", "lazy_itable_init=0,lazy_journal_init=1")
# Where all reads as zeros, nothing has to be made so; and the journal is no larger than it is worth.
_ON_ZEROS = ("-i", "8192", "-J", "size=32", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1")
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def counts_projects(path: Path) -> bool:
    """Whether the file system that `path`, or what exists of it, lies on bounds projects: it was mounted so."""
    while not path.exists():
        path = path.parent
    return "prjquota" in _mount_options(path)


def _mount_options(path: Path) -> list[str]:
    """Of its file system."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    mount = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[0] == mount:
            return rest.split()[-1].split(",")
    return []


def why_no_image() -> str:
    """Why there can be no file systems in files here; empty if there can."""
    if _mkfs() is None:
        return "there is no mkfs.ext4: install e2fsprogs"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices: load them with `modprobe loop`"
    return ""


def _mkfs() -> str | None:
    return shutil.which(f"mkfs.{IMAGE_TYPE}", path=f"{os.environ.get('PATH', '')}:{_SBIN}")


def make_image(image: Path, size_bytes: int, content: Path) -> None:
    """A file system of that size, with a copy of the directory `content`, in a file that takes only what is used.

    Raises OSError.
    """
    if size_bytes > MAX_IMAGE_BYTES:
        what = f"a file system in a file has at most {MAX_IMAGE_BYTES} bytes, and {size_bytes} are wanted"
        raise OSError(errno.EFBIG, what)
    image.touch(exist_ok=False)
    try:
        os.truncate(image, max(size_bytes, MIN_IMAGE_BYTES))
        _mkfs_on(image, *_IN_A_FILE, "-d", str(content), str(image))
    except OSError:
        image.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # a file system without attributes: what is empty then counts as used
        os.setxattr(image, _EMPTY, b"%d" % image.stat().st_blocks)


def make_file_system(device: Path, size_bytes: int) -> None:
    """An empty file system of that size on a larger block device, all of which reads as zeros. Raises OSError."""
    _mkfs_on(device, *_ON_ZEROS, str(device), f"{size_bytes >> 10}k")


def _mkfs_on(path: Path, *arguments: str) -> None:
    """Raises OSError."""
    program = _mkfs() or f"mkfs.{IMAGE_TYPE}"
    done = subprocess.run(
        [program, *_MKFS_OPTIONS, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(5, f"{program}: {done.stderr.strip() or done.returncode}", str(path))


def image_usage(image: Path) -> int:
    """Bytes that the file takes beyond what it took when it was empty. Raises OSError."""
    empty = 0
    with suppress(OSError, ValueError):
        empty = int(os.getxattr(image, _EMPTY))
    return max(0, image.stat().st_blocks - empty) * 512


def bound_project(directory: Path, limit_bytes: int, *, holding: Iterable[str] = ()) -> None:
    """Bound a directory where projects are counted. It is empty, but for the empty directories it holds.

    Raises OSError.
    """
    with _opened(directory) as fd:
        try:
            project_quota.bound(fd, limit_bytes)
        except OSError as e:
            if e.errno != errno.ERANGE:
                raise
            raise OSError(errno.EFBIG, f"no quota of {limit_bytes} bytes can be had here", str(directory)) from e
        project = project_quota.project_of(fd)
    for name in holding:
        with _opened(directory / name) as fd:
            project_quota.join(fd, project)


def release_project(directory: Path) -> None:
    """Before the directory goes. None there is no error. Raises OSError."""
    with suppress(FileNotFoundError), _opened(directory) as fd:
        project_quota.release(fd)


def project_usage(directory: Path) -> ProjectUsage | None:
    """None if it is not bounded. Raises OSError."""
    with _opened(directory) as fd:
        return project_quota.usage(fd)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
