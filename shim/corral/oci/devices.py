"""The container's /dev: nodes, links and the console, as steps."""

import contextlib
import functools
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


DEFAULT_DEVICES = tuple(
    Device(path=f"/dev/{name}", type=DeviceType.CHAR, major=major, minor=minor, file_mode=0o666)
    for name, major, minor in (
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    )
)
"""What every container has, whatever config.json says. Source: runtime-spec config-linux.md "default devices"."""

DEFAULT_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
"""Names in /dev, and where they lead."""


@dataclass(frozen=True, slots=True)
class DeviceNode(Step):
    """A device node; one that is there already is left as it is (a bind mount of the user's wins)."""

    device: Device

    def describe(self) -> str:
        device = self.device
        return f"{device.path}: device {device.type.value} {device.major}:{device.minor}"

    def prepare(self, stage: Stage) -> None:
        if stage.own is not None and (node := _of_the_host(self.device)) is not None:
            stage.trees[_key(self.device)] = node

    def apply(self, stage: Stage) -> None:
        device = self.device
        path = normal(device.path)
        directory, name = os.path.split(path)
        if not name or device.type is DeviceType.ALL:
            raise ExecFailed(SETUP, f"device {device.path!r}: not a device node")
        make = _make if stage.own is None or device.type is DeviceType.FIFO else functools.partial(_bind, stage)
        if stage.dev is not None and directory == "/dev":
            make(device, name, stage.dev)
        elif not (stage.dev_is_the_hosts and path.startswith("/dev/")):
            with paths.opened(paths.make_directory_in_root(stage.root, directory)) as parent:
                make(device, name, parent)


def _key(device: Device) -> str:
    return f"device {device.path}"


def _of_the_host(device: Device) -> int | None:
    """A detached mount of the host's node for a device, for in a user namespace none can be made; None if it has none.

    Mode and owner are the host's, and stay so.
    """
    kind = _FILE_TYPE.get(device.type)
    numbers = f"{device.major}:{device.minor}"
    for path in (device.path, f"/dev/{'block' if kind == stat.S_IFBLK else 'char'}/{numbers}"):
        with contextlib.suppress(OSError), paths.opened(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd:
            status = os.fstat(fd)
            if stat.S_IFMT(status.st_mode) == kind and status.st_rdev == os.makedev(device.major, device.minor):
                tree = mount.clone_tree(fd)
                mount.set_attributes(tree, attr_set=mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NOEXEC)
                return tree
    return None


def _bind(stage: Stage, device: Device, name: str, parent: int) -> None:
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666, dir_fd=parent))
    except FileExistsError:
        return
    node = stage.trees.pop(_key(device), None)
    if node is None:
        raise ExecFailed(
            SETUP,
            f"device {device.path}: in a user namespace it is that of the host, which has no such device there "
            f"({device.type.value} {device.major}:{device.minor})",
        )
    mount.move_mount(node, parent, name, what=device.path, where=device.path)


def _make(device: Device, name: str, parent: int) -> None:
    mode = _FILE_TYPE[device.type] | (0o666 if device.file_mode is None else device.file_mode & 0o7777)
    with contextlib.suppress(FileExistsError):
        os.mknod(name, mode, os.makedev(device.major, device.minor), dir_fd=parent)
        if device.uid or device.gid:
            os.chown(name, device.uid, device.gid, dir_fd=parent, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class DefaultDevices(Step):
    """The device nodes that every container has."""

    def describe(self) -> str:
        return f"default devices: {' '.join(device.path for device in DEFAULT_DEVICES)}"

    def prepare(self, stage: Stage) -> None:
        if stage.own is not None:
            for device in DEFAULT_DEVICES:
                DeviceNode(device).prepare(stage)

    def apply(self, stage: Stage) -> None:
        if not stage.dev_is_ready:
            for device in DEFAULT_DEVICES:
                DeviceNode(device).apply(stage)


@dataclass(frozen=True, slots=True)
class DefaultLinks(Step):
    """Symbolic links in /dev; a name that is taken stays as it is."""

    def describe(self) -> str:
        return f"links in /dev: {' '.join(DEFAULT_LINKS)}"

    def apply(self, stage: Stage) -> None:
        if stage.dev is not None and not stage.dev_is_ready:
            _make_links(stage.dev)


def make_default_devices(dev: int) -> None:
    """The default nodes and links in a tmpfs that is new. The caller's umask counts."""
    for device in DEFAULT_DEVICES:
        _make(device, device.path.removeprefix("/dev/"), dev)
    _make_links(dev)


def _make_links(dev: int) -> None:
    for name, target in DEFAULT_LINKS.items():
        with contextlib.suppress(FileExistsError):
            os.symlink(target, name, dir_fd=dev)


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
