"""Where a driver's directory lies."""

import os
from pathlib import Path

from corral.kernel.syncfs import syncfs


def file_system_of(path: Path) -> str:
    """The type of the file system that `path`, or what exists of it, lies on; empty if that cannot be told."""
    while not path.exists():
        path = path.parent
    # Not by st_dev, which on btrfs is another one for every subvolume, and none of the mount's.
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    mount = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            if fields.split()[0] == mount:
                return rest.split()[0]
    return ""


def takes_devices(path: Path) -> bool:
    """Whether device nodes in `path`, or what exists of it, can be opened."""
    while not path.exists():
        path = path.parent
    return not os.statvfs(path).f_flag & os.ST_NODEV


def kernel_has(file_system: str) -> bool:
    """Whether the kernel has it loaded."""
    return file_system in Path("/proc/filesystems").read_text().split()


def numbered(*directories: Path) -> list[int]:
    """The numbers that are names in these directories."""
    return [int(path.name) for directory in directories for path in directory.iterdir() if path.name.isdigit()]


def sync_file_system(path: Path) -> None:
    """Write out everything of the file system that the directory lies on. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs(fd)
    finally:
        os.close(fd)


def new_directory(path: Path) -> Path:
    """As an image's root looks where no entry says otherwise, whatever the umask."""
    path.mkdir()
    path.chmod(0o755)
    return path
