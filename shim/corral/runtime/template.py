"""spec, features, and the commands that are not there."""

import json
import os

from corral.kernel.cgroup import detect
from corral.kernel.cgroup.layout import Kind
from corral.oci import OCI_VERSION
from corral.oci.features import features_document
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.flags import MANY, SWITCH, VALUE, Flags, Options
from corral.runtime.show import print_json

SPEC_FLAGS: Flags = {"bundle,b": VALUE, "rootless": SWITCH}
CHECKPOINT_FLAGS: Flags = {
    **dict.fromkeys(("image-path", "work-path", "parent-path", "status-fd", "page-server"), VALUE),
    **dict.fromkeys(("manage-cgroups-mode", "lsm-profile", "lsm-mount-context"), VALUE),
    **dict.fromkeys(("leave-running", "tcp-established", "tcp-skip-in-flight", "ext-unix-sk", "shell-job"), SWITCH),
    **dict.fromkeys(("link-remap", "lazy-pages", "file-locks", "pre-dump", "auto-dedup", "no-subreaper"), SWITCH),
    **dict.fromkeys(("no-pivot", "detach,d"), SWITCH),
    **dict.fromkeys(("bundle,b", "console-socket", "pid-file"), VALUE),
    "empty-ns": MANY,
}

_CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")
_MASKED = ("acpi", "asound", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")
_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
_DEV = ["nosuid", "strictatime", "mode=755", "size=65536k"]
_NO = ["nosuid", "noexec", "nodev"]


def print_spec(_context: Context, options: Options, _arguments: list[str]) -> int:
    """Write a config.json to begin with into the bundle; one that is there is left alone."""
    path = os.path.join(options.text("bundle") or ".", "config.json")  # noqa: PTH118 - as the flag gave it
    shown = detect().kind is not Kind.V2  # as runc's: a cgroup namespace on a host of v2 alone
    rootless = options.on("rootless")
    document = rootless_spec(os.geteuid(), os.getegid(), shown=shown) if rootless else default_spec(shown=shown)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise CommandError("File config.json exists. Remove it first") from None
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
    return 0


def default_spec(*, shown: bool = False) -> dict[str, object]:
    """A shell in namespaces of its own, on a read-only root. shown: the host's paths of cgroups."""
    return _spec(
        [
            _mount("/sys", "sysfs", "sysfs", [*_NO, "ro"]),
            _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*_NO, "relatime", "ro"]),
        ],
        {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", *_cgroup(shown=shown))],
        },
        devpts=["gid=5"],
    )


def rootless_spec(uid: int, gid: int, *, shown: bool = False) -> dict[str, object]:
    """The same for an ordinary user, who is root in it and shares the host's network."""
    return _spec(
        [
            _mount("/sys", "none", "/sys", ["rbind", *_NO, "ro"]),
            _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*_NO, "relatime", "ro"]),
        ],
        {
            "uidMappings": [{"containerID": 0, "hostID": uid, "size": 1}],
            "gidMappings": [{"containerID": 0, "hostID": gid, "size": 1}],
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", *_cgroup(shown=shown), "user")],
        },
        devpts=[],
    )


def _cgroup(*, shown: bool) -> tuple[str, ...]:
    return () if shown else ("cgroup",)


def _spec(mounts: list[object], linux: dict[str, object], *, devpts: list[str]) -> dict[str, object]:
    held = list(_CAPABILITIES)
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": held, "effective": held, "permitted": held},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "corral",
        "mounts": [
            _mount("/proc", "proc", "proc", _NO),
            _mount("/dev", "tmpfs", "tmpfs", _DEV),
            _mount(
                "/dev/pts",
                "devpts",
                "devpts",
                ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *devpts],
            ),
            _mount("/dev/shm", "tmpfs", "shm", [*_NO, "mode=1777", "size=65536k"]),  # noqa: S108 - in a container
            _mount("/dev/mqueue", "mqueue", "mqueue", _NO),
            *mounts,
        ],
        "linux": {
            **linux,
            "maskedPaths": [*(f"/proc/{name}" for name in _MASKED), "/sys/firmware", "/sys/devices/virtual/powercap"],
            "readonlyPaths": [f"/proc/{name}" for name in _READ_ONLY],
        },
    }


def _mount(destination: str, kind: str, source: str, options: list[str]) -> dict[str, object]:
    return {"destination": destination, "type": kind, "source": source, "options": options}


def print_features(_context: Context, _options: Options, _arguments: list[str]) -> int:
    """Print what the runtime can do."""
    print_json(features_document(), indent=2)
    return 0


def checkpoint(_context: Context, _options: Options, _arguments: list[str]) -> int:
    """Refuse it."""
    raise CommandError("checkpoint: containers can't be checkpointed: corral-oci does not drive CRIU")


def restore(_context: Context, _options: Options, _arguments: list[str]) -> int:
    """Refuse it."""
    raise CommandError("restore: containers can't be restored: corral-oci does not drive CRIU")
