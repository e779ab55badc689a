"""File systems of a test's own, in a file."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from support.requirements import lacking

if TYPE_CHECKING:
    from support.corrald import Corrald

MKFS = {
    "btrfs": ("mkfs.btrfs", "-q"),
    "xfs": ("mkfs.xfs", "-q"),
    "ext4": ("mkfs.ext4", "-q"),
}
# Those that count projects, and how they are made and mounted so.
COUNTING = {
    "ext4-projects": ("ext4", ("-O", "quota,project", "-E", "quotatype=prjquota")),
    "xfs-projects": ("xfs", ()),
}
# Of btrfs, which counts subvolumes.
SIMPLE_QUOTAS = "btrfs-quotas"
PACKAGES = {"btrfs": "btrfs-progs", "xfs": "xfsprogs", "ext4": "e2fsprogs"}


def lacking_file_system(kind: str) -> str | None:
    """Why there can be none of this kind here."""
    if kind == SIMPLE_QUOTAS:
        return lacking_file_system("btrfs") or lacking(kind)
    if kind in COUNTING:
        return lacking_file_system(COUNTING[kind][0]) or lacking(kind)
    if reason := lacking(kind):
        return reason
    program = MKFS[kind][0]
    return None if shutil.which(program) else f"needs the program {program} (package {PACKAGES[kind]})"


def loop_devices(root: Path) -> list[str]:
    """The files below it that are loop devices now."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # it went just now
            found.append(path.read_text().strip())
    return [name for name in found if name.startswith(str(root))]


class FileSystems:
    """One of each kind, made when it is first asked for; every test has a directory of its own in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mounted: dict[str, Path] = {}
        self._stack = ExitStack()

    def place(self, kind: str) -> Path:
        """A new directory on such a file system. It stays until close()."""
        if kind not in self._mounted:
            basic, features = COUNTING.get(kind, (kind, ()))
            if kind == SIMPLE_QUOTAS:
                basic, features = "btrfs", ("-O", "squota")
            options = "loop,prjquota" if kind in COUNTING else "loop"
            directory = self._directory / kind
            directory.mkdir()
            made = file_system(basic, directory, size_mb=4096, features=features, options=options)
            self._mounted[kind] = self._stack.enter_context(made)
        return Path(tempfile.mkdtemp(dir=self._mounted[kind]))

    def close(self) -> None:
        self._stack.close()


@contextmanager
def file_system(
    kind: str, directory: Path, *, size_mb: int = 512, features: tuple[str, ...] = (), options: str = "loop"
) -> Iterator[Path]:
    """A file system in a sparse file of `directory`, mounted there within the block. Yields where."""
    image, where = directory / f"{kind}.img", directory / kind
    with image.open("wb") as file:
        file.truncate(size_mb << 20)
    subprocess.run([*MKFS[kind], *features, image], check=True, stdout=subprocess.DEVNULL)
    where.mkdir()
    try:
        with mounted_image(image, where, options=options):
            yield where
    finally:
        image.unlink()


@contextmanager
def mounted_image(image: Path, where: Path, *, options: str = "loop") -> Iterator[None]:
    """Within the block."""
    subprocess.run(["mount", "-o", options, image, where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


@contextmanager
def small_disk(daemon: "Corrald", size: str) -> Iterator[Path]:
    """A daemon's data root on a disk of its own; yields a file that fills it when asked."""
    daemon.root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "corral-test", daemon.root], check=True)
    try:
        yield daemon.root / "junk"
    finally:
        subprocess.run(["umount", "-l", "-q", daemon.root], check=False)  # a failing test left it mounted


def fill(junk: Path) -> None:
    """Until its disk takes nothing more."""
    with suppress(OSError), junk.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
