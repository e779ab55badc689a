"""Block devices that the kernel maps onto others: made, asked and removed by name, each with one target.

Source: linux/dm-ioctl.h; Documentation/admin-guide/device-mapper/{dm-ioctl,thin-provisioning}.rst.
"""

import errno
import fcntl
import os
import struct
import time
from dataclasses import dataclass

from corral.kernel.syscalls import failure

CONTROL = "/dev/mapper/control"
SECTOR_BYTES = 512
BUSY_S = 5.0
"""How long to wait for a device that is in use: what was unmounted just now, or is looked at by udev, is free soon."""

# struct dm_ioctl: version, data_size, data_start, target_count, open_count, flags, event_nr, dev, name, uuid
_HEADER = struct.Struct("=3IIIIiIIxxxxQ128s129s7x")
_TARGET = struct.Struct("=QQiI16s")  # struct dm_target_spec
_VERSION = (4, 0, 0)  # all of 4 understand each other
_BUFFER_BYTES = 4096
# Command numbers, of an enum.
_CREATE, _REMOVE, _SUSPEND, _STATUS, _LOAD, _TABLE_STATUS, _MESSAGE, _TARGET_VERSION = 3, 4, 6, 7, 9, 12, 14, 17
_READ_ONLY, _NO_FLUSH = 1 << 0, 1 << 11


@dataclass(frozen=True, slots=True)
class Target:
    """What a device does with its sectors."""

    type: str
    sectors: int
    parameters: str


@dataclass(frozen=True, slots=True)
class Device:
    """number: as in st_rdev."""

    number: int
    open_count: int


def why_none(target: str) -> str:
    """Why this kernel has no devices with such a target; empty if it has."""
    try:
        _call(_TARGET_VERSION, target)  # loads its module
    except OSError as e:
        if e.errno == errno.ENOTTY:  # before Linux 4.18: making a device will tell
            return ""
        if e.filename == CONTROL:
            return f"device mapper: {CONTROL} cannot be opened ({os.strerror(e.errno or 0)}): the kernel has none"
        return f"device mapper: the kernel has no target {target}"
    return ""


def find(name: str) -> Device | None:
    """None if there is no such device. Raises OSError."""
    try:
        answer = _call(_STATUS, name)
    except OSError as e:
        if e.errno == errno.ENXIO:
            return None
        raise
    return _device(answer)


def create(name: str, target: Target, *, read_only: bool = False) -> Device:
    """A new device, ready for use. Raises OSError naming it; then there is none."""
    flags = _READ_ONLY if read_only else 0
    _call(_CREATE, name, flags=flags)
    try:
        parameters = target.parameters.encode() + b"\0"
        size = _TARGET.size + len(parameters)
        size += -size % 8
        table = _TARGET.pack(0, target.sectors, 0, size, target.type.encode()) + parameters
        _call(_LOAD, name, table, flags=flags, targets=1)
        return _device(_call(_SUSPEND, name, flags=flags))  # without the flag to suspend it resumes
    except BaseException:
        _call(_REMOVE, name)
        raise


def remove(name: str, *, wait_s: float = BUSY_S) -> None:
    """Remove a device; none there is no error. Raises OSError: EBUSY if it is still in use after that time."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            _call(_REMOVE, name)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            if e.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        else:
            return
        time.sleep(0.02)


def message(name: str, text: str) -> None:
    """Tell a device's target something. Raises OSError naming the device."""
    _call(_MESSAGE, name, struct.pack("=Q", 0) + text.encode() + b"\0")


def status(name: str, *, flush: bool = False) -> str:
    """What a device's target says of itself. flush: a thin pool commits first what it counts. Raises OSError."""
    answer = _call(_TABLE_STATUS, name, flags=0 if flush else _NO_FLUSH)
    start = _HEADER.unpack_from(answer)[4] + _TARGET.size
    return bytes(answer[start:]).partition(b"\0")[0].decode("ascii").strip()


def _device(answer: bytes) -> Device:
    fields = _HEADER.unpack_from(answer)
    return Device(number=fields[9], open_count=fields[6])


def _call(command: int, name: str, data: bytes = b"", *, flags: int = 0, targets: int = 0) -> bytes:
    header = _HEADER.pack(*_VERSION, _BUFFER_BYTES, _HEADER.size, targets, 0, flags, 0, 0, name.encode(), b"")
    buffer = bytearray((header + data).ljust(_BUFFER_BYTES, b"\0"))
    request = 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command  # _IOWR(DM_IOCTL, command, struct dm_ioctl)
    control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, request, buffer)
    except OSError as e:
        raise failure(e.errno or errno.EIO, "device mapper", name) from e
    finally:
        os.close(control)
    return bytes(buffer)
