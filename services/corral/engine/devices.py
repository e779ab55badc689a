"""Devices of the host for a container: what to make inside, and which accesses its cgroup allows."""

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.api.types.v1.types_pb2 import DeviceRule
from corral.oci.spec import Device, DeviceType
from corral.rpc.errors import InvalidArgument, NotFound

# What every container may access; all else is denied.
# Source: runc libcontainer/specconv, OCI config-linux "Default Devices".
# (type, major, minor, access); None: any.
_DEFAULT_RULES: Sequence[tuple[str, int | None, int | None, str]] = (
    ("c", None, None, "m"),  # nodes may be made, that alone opens nothing
    ("b", None, None, "m"),
    ("c", 1, 3, "rwm"),  # null
    ("c", 1, 5, "rwm"),  # zero
    ("c", 1, 7, "rwm"),  # full
    ("c", 1, 8, "rwm"),  # random
    ("c", 1, 9, "rwm"),  # urandom
    ("c", 5, 0, "rwm"),  # tty
    ("c", 5, 2, "rwm"),  # ptmx
    ("c", 136, None, "rwm"),  # pts/*
)
# Nodes below these are the container's own business.
_NOT_PASSED = ("/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/console", "/dev/fd", "/dev/core")  # noqa: S108


@dataclass(frozen=True, slots=True)
class GrantedDevice:
    """A device node to make inside, and the accesses to it."""

    device: Device
    access: str


def grant(options: Iterable[str]) -> list[GrantedDevice]:
    """The devices meant by "/dev/fuse", "/dev/fuse:/dev/x" or "/dev/fuse:/dev/x:rw"; a directory means all in it.

    Raises InvalidArgument, NotFound.
    """
    return [granted for option in options for granted in _grant(option)]


def _grant(option: str) -> list[GrantedDevice]:
    source, _, rest = option.partition(":")
    target, _, access = rest.partition(":")
    if not access and target and not target.startswith("/"):
        target, access = "", target
    access = access or "rwm"
    if not source.startswith("/dev/") or set(access) - set("rwm") or not (target or source).startswith("/"):
        raise InvalidArgument(
            f"{option!r} is no device: give /dev/NAME, /dev/NAME:/dev/INSIDE or /dev/NAME:/dev/INSIDE:rwm"
        )
    path = Path(source)
    if path.is_dir():
        return [
            GrantedDevice(device, access)
            for device in _below(path)
            for device in [_moved(device, source, target or source)]
        ]
    device = host_device(path)
    if device is None:
        raise NotFound(f"the host has no device {source}", reason="NO_DEVICE", metadata={"device": source})
    return [GrantedDevice(_moved(device, source, target or source), access)]


def _moved(device: Device, source: str, target: str) -> Device:
    path = target + device.path.removeprefix(source)
    return Device(path, device.type, device.major, device.minor, device.file_mode, device.uid, device.gid)


def host_device(path: Path) -> Device | None:
    """The device node at `path`, links followed; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    if stat.S_ISCHR(status.st_mode):
        kind = DeviceType.CHAR
    elif stat.S_ISBLK(status.st_mode):
        kind = DeviceType.BLOCK
    else:
        return None
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return Device(str(path), kind, major, minor, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def _below(directory: Path) -> list[Device]:
    found = []
    for root, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if f"{root}/{name}" not in _NOT_PASSED]
        for name in names:
            path = Path(root, name)
            if str(path) in _NOT_PASSED or path.is_symlink():
                continue
            if (device := host_device(path)) is not None:
                found.append(device)
    return found


def every_device() -> list[GrantedDevice]:
    """All of the host's, for a privileged container."""
    return [GrantedDevice(device, "rwm") for device in _below(Path("/dev"))]


def rules(granted: Iterable[GrantedDevice], *, privileged: bool) -> list[DeviceRule]:
    """The complete list for the container's cgroup, the last match wins."""
    if privileged:
        return [DeviceRule(allow=True, type="a", access="rwm")]
    found = [DeviceRule(allow=False, type="a", access="rwm")]
    found += [
        DeviceRule(allow=True, type=kind, major=major, minor=minor, access=access)
        for kind, major, minor, access in _DEFAULT_RULES
    ]
    found += [
        DeviceRule(
            allow=True,
            type=item.device.type.value,
            major=item.device.major,
            minor=item.device.minor,
            access=item.access,
        )
        for item in granted
    ]
    return found
