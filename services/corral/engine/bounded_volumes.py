"""The directories of volumes, some of which hold no more than so many bytes, or lie elsewhere.

    <volume>/data     what is mounted in containers; of one that lies elsewhere, where that is mounted
    <volume>/image    of a bounded one, where neither projects are counted nor subvolumes can be bounded: a file system
                      that is mounted on data, in the host's sight, so that all containers that use it share the one

All of it can be repeated: what a crash left half-made is made anew, and what a reboot unmounted is mounted.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from corral.engine import mounted_volumes
from corral.kernel import btrfs, mount
from corral.kernel.loop import mount_file
from corral.kernel.syscalls import AT_FDCWD, filesystem_magic
from corral.rpc.errors import FailedPrecondition, InvalidArgument
from corral.store import failpoint, remove_tree
from corral.store.bounded import (
    IMAGE_TYPE,
    MIN_IMAGE_BYTES,
    bound_project,
    counts_projects,
    image_usage,
    make_image,
    project_usage,
    release_project,
    why_no_image,
)

SIZE = "size"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bkmgtp]?)(?:i?b)?", re.IGNORECASE)


def quota_bytes(options: Mapping[str, str]) -> int:
    """What a volume's options allow it; 0 if they do not say. Raises InvalidArgument."""
    text = options.get(SIZE, "")
    if not text:
        return 0
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidArgument(f"size {text!r} is not understood: give a number with k, m, g or t, such as 10g")
    size = int(float(found[1]) * 1024 ** "bkmgtp".index(found[2].lower() or "b"))
    if size < MIN_IMAGE_BYTES:
        raise InvalidArgument(f"a volume's size is at least {MIN_IMAGE_BYTES >> 20} MiB, {text!r} is less")
    return size


def why_unbounded(root: Path) -> str:
    """Why no volume below `root` can be bounded; empty if they can."""
    return "" if counts_projects(root) or _bounds_subvolumes(root) else why_no_image()


def check_bounds(root: Path) -> None:
    """Raises FailedPrecondition if no volume below `root` can be bounded."""
    if reason := why_unbounded(root):
        raise FailedPrecondition(f"a volume's size cannot be bounded here: {reason}", reason="NO_QUOTA")


def ready(directory: Path, options: Mapping[str, str]) -> Path:
    """Have the data directory of a volume with these options, made if need be; returns it. Blocking.

    Raises OSError; FailedPrecondition if it lies elsewhere, where it cannot be had.
    """
    data, image, quota = directory / "data", directory / "image", quota_bytes(options)
    directory.mkdir(parents=True, exist_ok=True)
    if (source := mounted_volumes.source_of(options)) is not None:
        mounted_volumes.ready(data, source)
    elif not quota:
        data.mkdir(exist_ok=True)
    elif image.exists() or (not data.exists() and not counts_projects(directory) and not _bounds_subvolumes(directory)):
        _ready_image(directory, data, image, quota)
    elif not data.exists():
        _make_bounded(directory, data, quota)
    return data


def prepare(directory: Path, options: Mapping[str, str]) -> None:
    """The same, but of one that lies elsewhere, whose server may be down now, only the place. Raises OSError."""
    if mounted_volumes.source_of(options) is None:
        ready(directory, options)
    elif not mounted_volumes.is_mounted(directory / "data"):
        (directory / "data").mkdir(parents=True, exist_ok=True)


def _bounds_subvolumes(path: Path) -> bool:
    """Whether it lies on btrfs, and with the only quotas that nobody leaves by making subvolumes."""
    while not path.exists():
        path = path.parent
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return filesystem_magic(fd) == btrfs.MAGIC and btrfs.counts_simply(fd)
    finally:
        os.close(fd)


def _make_bounded(directory: Path, data: Path, quota: int) -> None:
    """It has its name when it has its limit."""
    new = directory / "data.new"
    release_project(new)
    remove_tree(new)
    if counts_projects(directory):
        new.mkdir()
        bound_project(new, quota)
    else:
        with _opened(directory) as fd:
            btrfs.create_subvolume(fd, new.name)
        with _opened(new) as fd, _opened(directory) as outside:
            btrfs.limit(fd, quota, outside=outside)
    new.chmod(0o755)
    new.rename(data)


def _ready_image(directory: Path, data: Path, image: Path, quota: int) -> None:
    if not image.exists():
        new, empty = directory / "image.new", directory / "empty"
        new.unlink(missing_ok=True)
        empty.mkdir(exist_ok=True)
        make_image(new, quota, empty)
        empty.rmdir()
        new.rename(image)
        failpoint("engine.volume.after_image")
    data.mkdir(exist_ok=True)
    if data.is_mount():
        return
    tree = mount_file(IMAGE_TYPE, str(image), ("discard",), device=True)
    try:
        mount.move_mount(tree, AT_FDCWD, data, what=image, where=data)
    finally:
        os.close(tree)
    failpoint("engine.volume.after_mount")
    lost = data / "lost+found"
    if lost.is_dir() and not any(lost.iterdir()):
        lost.rmdir()


def remove(directory: Path, *, lies_elsewhere: bool = False) -> None:
    """Remove a volume that no container uses; none there is no error. Blocking. Raises OSError.

    What is mounted on its data is not ours to remove: only an empty directory goes then, which rmdir(2) sees to.
    """
    data = directory / "data"
    if lies_elsewhere or mounted_volumes.is_mounted(data):
        mounted_volumes.release(data)
        with suppress(FileNotFoundError):
            data.rmdir()
    release_project(data)
    if data.is_dir() and _bounds_subvolumes(data):
        _lift(data)
    remove_tree(directory)


def _lift(data: Path) -> None:
    with _opened(data) as fd, _opened(data.parent) as outside:
        if btrfs.is_subvolume(fd):
            btrfs.lift_limit(fd, outside=outside)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def used_bytes(directory: Path) -> int:
    """What a bounded volume takes now; 0 if that is not known. Blocking."""
    try:
        if (directory / "image").exists():
            return image_usage(directory / "image")
        counted = project_usage(directory / "data")
    except OSError:
        return 0
    return 0 if counted is None else counted.used_bytes
