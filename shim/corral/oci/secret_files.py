"""Files that are in no image and on no disk: each container's own, in a tmpfs, read-only.

Those below /run/secrets lie in one tmpfs there. One that is wanted elsewhere is mounted there alone, out of a tmpfs
that has no place itself.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from corral.kernel import mount, paths
from corral.kernel.mount import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY
from corral.oci import trees
from corral.oci.mounts import place
from corral.oci.stage import Stage, Step, normal

DIRECTORY = "/run/secrets"
_ATTRIBUTES = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
_OPTIONS = ("mode=0755",)
_NO_SWAP = "noswap"
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class SecretFile:
    """One file; `target` is an absolute path inside."""

    target: str
    uid: int
    gid: int
    mode: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SecretFiles(Step):
    """Mount all of a container's, over whatever is there. context: their SELinux label, if they are to have one."""

    files: tuple[SecretFile, ...]
    context: str = ""

    def describe(self) -> str:
        return f"{len(self.files)} secrets"

    def apply(self, stage: Stage) -> None:
        below = {each: name for each in self.files if (name := _below(each.target))}
        if below:
            self._mount_directory(stage, below)
        elsewhere = [each for each in self.files if each not in below]
        if elsewhere:
            self._mount_alone(stage, elsewhere)

    def _mount_directory(self, stage: Stage, files: dict[SecretFile, str]) -> None:
        with (
            paths.opened(_new_tmpfs(self.context)) as tree,
            paths.opened(place(stage, DIRECTORY, None, directory=True)) as target,
        ):
            for each, name in files.items():
                _write(tree, name, each)
            mount.set_attributes(tree, attr_set=MOUNT_ATTR_RDONLY, where=DIRECTORY)
            mount.move_mount(tree, target, what="secrets", where=DIRECTORY)

    def _mount_alone(self, stage: Stage, files: Sequence[SecretFile]) -> None:
        with paths.opened(_new_tmpfs(self.context)) as tree:
            for number, each in enumerate(files):
                _write(tree, str(number), each)
            for each, single in zip(files, _taken_apart(tree, len(files), stage.bundle), strict=True):
                with paths.opened(single), paths.opened(place(stage, each.target, None, directory=False)) as target:
                    mount.set_attributes(single, attr_set=MOUNT_ATTR_RDONLY, where=each.target)
                    mount.move_mount(single, target, what="a secret", where=each.target)


def _below(target: str) -> str:
    """Its path in DIRECTORY; empty if it lies elsewhere."""
    path = normal(target)
    return path.removeprefix(f"{DIRECTORY}/") if path.startswith(f"{DIRECTORY}/") else ""


def _new_tmpfs(context: str) -> int:
    options = (*_OPTIONS, f"context={context}") if context else _OPTIONS
    try:
        return mount.new_mount("tmpfs", "secrets", (*options, _NO_SWAP), attributes=_ATTRIBUTES)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EPERM):
            raise
    # noswap is of Linux 6.4, and not for user namespaces.
    return mount.new_mount("tmpfs", "secrets", options, attributes=_ATTRIBUTES)


def _write(tree: int, name: str, file: SecretFile) -> None:
    directory, _, last = name.rpartition("/")
    above = paths.make_directory_in_root(tree, directory) if directory else os.dup(tree)
    with paths.opened(above):
        fd = os.open(last, _FLAGS, 0o600, dir_fd=above)
        with paths.opened(fd):
            view = memoryview(file.data)
            while view:
                view = view[os.write(fd, view) :]
            os.fchown(fd, file.uid, file.gid)
            os.fchmod(fd, file.mode)


def _taken_apart(tree: int, count: int, scratch: str) -> list[int]:
    """Each file of a detached mount as a detached mount of its own."""
    return trees.part_of(
        tree, lambda: [mount.clone_tree(tree, str(number)) for number in range(count)], scratch, what="secrets"
    )
