"""Volumes that lie elsewhere: an NFS export, a device, a tmpfs, a directory of the host; mounted by mount(8).

    corral volume create --opt type=nfs --opt o=addr=10.0.0.1,rw --opt device=:/export data

As docker's local driver has it, the first container that uses one has it mounted. It is in the host's sight, so that
all containers share the one, and stays until the volume is removed, or the host restarts.
Source: docker/docs, "docker volume create", driver-specific options; mount(8).
"""

import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from corral.kernel import mount
from corral.rpc.errors import FailedPrecondition, InvalidArgument
from corral.store import failpoint
from corral.store.mountinfo import mounts_below

OPTIONS = frozenset({"type", "device", "o"})
PATIENCE_S = 60.0
"""A server that does not answer must not hold up a start for ever."""
_LOCKS: dict[Path, threading.Lock] = {}
"""By where it is mounted: containers that start at the same time have it mounted once."""


@dataclass(frozen=True, slots=True)
class Source:
    """What to mount, in the words of mount(8)."""

    type: str
    device: str
    options: str


def source_of(options: Mapping[str, str]) -> Source | None:
    """What a volume's options say; None if it is a directory of the engine's own. Raises InvalidArgument."""
    if not OPTIONS & options.keys():
        return None
    source = Source(options.get("type", ""), options.get("device", ""), options.get("o", ""))
    if "bind" in source.options.split(",") or "rbind" in source.options.split(","):
        source = Source(source.type or "none", source.device, source.options)
        if not source.device.startswith("/"):
            raise InvalidArgument(f"device {source.device!r}: a bind mount takes a directory's absolute path")
    for name, value in (("type", source.type), ("device", source.device)):
        if not value:
            raise InvalidArgument(f"the volume's option {name!r} is missing: a mount takes type, device and o")
        if value.startswith("-") or "\0" in value:
            raise InvalidArgument(f"the volume's option {name} cannot be {value!r}")
    return source


def ready(data: Path, source: Source) -> None:
    """Have it mounted on `data`. Blocking. Raises FailedPrecondition with mount(8)'s own words, OSError."""
    with _lock_of(data):
        if not is_mounted(data):
            data.mkdir(parents=True, exist_ok=True)
            _mount(data, source)


def _mount(data: Path, source: Source) -> None:
    options = ["-o", source.options] if source.options else []
    command = ["mount", "-t", source.type, *options, "--", source.device, str(data)]
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=null, stdout=null, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired as e:
            os.killpg(process.pid, signal.SIGKILL)  # with the helper that it has started, such as mount.nfs
            raise _refused(data, source, f"no answer within {PATIENCE_S:g} seconds") from e
    if process.returncode:
        raise _refused(data, source, " ".join(said.split()) or f"mount ended with status {process.returncode}")
    failpoint("engine.volume.after_foreign_mount")


def release(data: Path) -> None:
    """Unmount whatever is on `data`; no error if nothing is. Blocking. Raises OSError."""
    with _lock_of(data):
        while is_mounted(data):
            mount.umount(data)
            failpoint("engine.volume.after_unmount")


def is_mounted(data: Path) -> bool:
    """By the kernel's list: to stat(2) a subvolume looks like a mount, and waits for a server that is gone."""
    return data in mounts_below(data.parent)


def _lock_of(data: Path) -> threading.Lock:
    return _LOCKS.setdefault(data, threading.Lock())


def _refused(data: Path, source: Source, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the volume {data.parent.name!r} cannot be mounted ({source.type} from {source.device}): {why}",
        reason="MOUNT_FAILED",
    )
