"""The container's /dev: nodes, links and the console, as steps."""

import contextlib
import os
import stat
from dataclasses import dataclass

from corral.kernel import mount, paths, tty
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.spec import Device, DeviceType
from corral.oci.stage import Stage, Step, normal

_FILE_TYPE = {
    DeviceType.CHAR: stat.S_IFCHR,
    DeviceType.UNBUFFERED: stat.S_IFCHR,
    DeviceType.BLOCK: stat.S_IFBLK,
    DeviceType.FIFO: stat.S_IFIFO,
}


@dataclass(frozen=True, slots=True)
class DeviceNode(Step):
    """A device node; one that is there already is left as it is (a bind mount of the user's wins)."""

    device: Device

    def describe(self) -> str:
        device = self.device
        return f"{device.path}: device {device.type.value} {device.major}:{device.minor}"

    def apply(self, stage: Stage) -> None:
        device = self.device
        path = normal(device.path)
        directory, name = os.path.split(path)
        if not name or device.type is DeviceType.ALL:
            raise ExecFailed(SETUP, f"device {device.path!r}: not a device node")
        if stage.dev is not None and directory == "/dev":
            self._make(name, stage.dev)
        elif not (stage.dev_is_the_hosts and path.startswith("/dev/")):
            with paths.opened(paths.make_directory_in_root(stage.root, directory)) as parent:
                self._make(name, parent)

    def _make(self, name: str, parent: int) -> None:
        device = self.device
        mode = _FILE_TYPE[device.type] | (0o666 if device.file_mode is None else device.file_mode & 0o7777)
        with contextlib.suppress(FileExistsError):
            os.mknod(name, mode, os.makedev(device.major, device.minor), dir_fd=parent)
            if device.uid or device.gid:
                os.chown(name, device.uid, device.gid, dir_fd=parent, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class DeviceLink(Step):
    """A symbolic link in /dev."""

    name: str
    target: str

    def describe(self) -> str:
        return f"/dev/{self.name}: link to {self.target}"

    def apply(self, stage: Stage) -> None:
        if stage.dev is not None:
            with contextlib.suppress(FileExistsError):
                os.symlink(self.target, self.name, dir_fd=stage.dev)


@dataclass(frozen=True, slots=True)
class Console(Step):
    """A pty of the container's own devpts, its slave bound over /dev/console.

    Everything is reached through the fds of the mounts that were made just before, so nothing the image holds, and no
    link exchanged at the right moment, can turn the console into another file (CVE-2025-52565).
    """

    size: tuple[int, int] | None

    def describe(self) -> str:
        return "/dev/console: a pty of the container's devpts"

    def apply(self, stage: Stage) -> None:
        if stage.devpts is None:
            raise ExecFailed(SETUP, "a terminal needs a devpts mounted on /dev/pts")
        stage.console_master = tty.open_master(stage.devpts)
        stage.console_slave = tty.open_slave(stage.console_master)
        if self.size is not None:
            tty.set_window_size(stage.console_master, width=self.size[0], height=self.size[1])
        if stage.dev is not None:
            flags = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            with (
                paths.opened(os.open("console", flags, 0o600, dir_fd=stage.dev)) as place,
                paths.opened(mount.clone_tree(stage.console_slave)) as tree,
            ):
                mount.move_mount(tree, place, what="console", where="/dev/console")
