"""What a test may need of the machine, and how to find out whether it is there."""

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.kernel import labels
from corral.kernel.device_mapper import why_none


def needs(*what: str) -> pytest.MarkDecorator:
    """Skip the test, with its reason, where the machine lacks one of these: a key of PROBES, or a program."""
    return pytest.mark.requires(*what)


@functools.cache
def lacking(what: str) -> str | None:
    """Why the machine does not have it; None if it does."""
    probe = PROBES.get(what)
    if probe is not None:
        return probe()
    return None if shutil.which(what) else f"needs the program {what}"


def _root() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


def _file_system(name: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        known = Path("/proc/filesystems").read_text("ascii").split()
        return _root() or (None if name in known else f"needs the file system {name} in the kernel")

    return probe


def _overlayfs() -> str | None:
    """Registered is not enough: an upper directory must be possible where tests put theirs."""
    if reason := _file_system("overlay")():
        return reason
    kind = _mount_type(Path(tempfile.gettempdir()))
    return f"needs a temporary directory that is not on {kind}" if kind in ("overlay", "9p", "nfs") else None


def _mount_type(path: Path) -> str:
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return "unknown"


def _busybox() -> str | None:
    path = shutil.which("busybox")
    if path is None:
        return "needs busybox (package busybox-static)"
    # A program interpreter (PT_INTERP) means that it is the dynamic one, useless in an image of its own.
    return "needs the static busybox (package busybox-static)" if b"/ld-linux" in Path(path).read_bytes() else None


def _namespace(kind: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        return _root() or (None if Path(f"/proc/self/ns/{kind}").exists() else f"needs {kind} namespaces")

    return probe


def _nft() -> str | None:
    found = any(any(Path("/usr").glob(f"{where}/libnftables.so.1")) for where in ("lib*", "lib*/*"))
    return _root() or (None if found else "needs libnftables.so.1 (package libnftables1)")


def _cgroup(version: int) -> Callable[[], str | None]:
    def probe() -> str | None:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
        kinds = {line.partition(" - ")[2].split()[0] for line in mounts}
        wanted = "cgroup2" if version == 2 else "cgroup"
        if reason := _root():
            return reason
        if wanted not in kinds:
            return f"needs cgroup v{version}"
        if version == 2 and not _unified_memory():
            return "needs the memory controller on cgroup v2"
        return None

    return probe


def _unified_memory() -> bool:
    for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            controllers = Path(before.split()[4]) / "cgroup.controllers"
            return "memory" in controllers.read_text("ascii").split()
    return False


def _psi() -> str | None:
    """Of cgroups: /proc/pressure alone tells of the whole host."""
    for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 ") and Path(before.split()[4], "cgroup.pressure").exists():
            return _root()
    return "needs pressure (PSI) of cgroups"


def _any_cgroup() -> str | None:
    return None if _cgroup(1)() is None or _cgroup(2)() is None else _cgroup(1)()


def _apparmor() -> str | None:
    found = labels.has_apparmor() and shutil.which("apparmor_parser")
    return _root() or (None if found else "needs AppArmor and apparmor_parser")


def _systemd(wanted: bool) -> Callable[[], str | None]:
    def probe() -> str | None:
        if Path("/run/systemd/system").is_dir() == wanted:
            return None
        return "needs systemd as pid 1" if wanted else "needs a host without systemd"

    return probe


def _project_quota(kind: str) -> Callable[[], str | None]:
    """A kernel may count projects on one file system and not on another; it says so when it is to mount one."""

    def probe() -> str | None:
        from support.file_systems import COUNTING, file_system

        basic, features = COUNTING[kind]
        try:
            with (
                tempfile.TemporaryDirectory() as directory,
                file_system(basic, Path(directory), features=features, options="loop,prjquota"),
            ):
                return None
        except subprocess.CalledProcessError:
            return f"needs project quota on {basic} in the kernel"

    return probe


def _device_mapper() -> str | None:
    return _root() or why_none("thin-pool") or None


def _simple_quotas() -> str | None:
    """Linux 6.7 and btrfs-progs 6.7 have them."""
    from support.file_systems import file_system

    try:
        with (
            tempfile.TemporaryDirectory() as directory,
            file_system("btrfs", Path(directory), features=("-O", "squota")),
        ):
            return None
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "needs simple quotas of btrfs"


PROBES: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "overlayfs": _overlayfs,
    "busybox": _busybox,
    "netns": _namespace("net"),
    "userns": _namespace("user"),
    "timens": _namespace("time"),
    "nft": _nft,
    "apparmor": _apparmor,
    "systemd": _systemd(True),
    "no systemd": _systemd(False),
    "cgroup": _any_cgroup,
    "cgroup1": _cgroup(1),
    "cgroup2": _cgroup(2),
    "psi": _psi,
    "btrfs": _file_system("btrfs"),
    "xfs": _file_system("xfs"),
    "ext4": _file_system("ext4"),
    "aufs": _file_system("aufs"),
    "ext4-projects": _project_quota("ext4-projects"),
    "xfs-projects": _project_quota("xfs-projects"),
    "btrfs-quotas": _simple_quotas,
    "erofs": _file_system("erofs"),
    "device mapper": _device_mapper,
    "cni": lambda: None if Path("/usr/lib/cni/bridge").exists() else "needs Debian's containernetworking-plugins",
}
