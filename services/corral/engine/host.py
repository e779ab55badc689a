"""What this host has and lacks for running containers, observed from the kernel, with a remedy for each lack.

Functions of a root directory ("/" in life) and of what system calls answer; nothing is changed and nobody is asked.
"""

import errno
import grp
import os
import platform
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from corral.api.engine.v1.engine_pb2 import Check
from corral.engine.seccomp import kernel_version
from corral.kernel import capabilities
from corral.kernel.cgroup import detect

OK, WARNING, MISSING = Check.RESULT_OK, Check.RESULT_WARNING, Check.RESULT_MISSING
# open_tree and move_mount came with 5.2, clone3 and pidfd_open with 5.3, openat2 with 5.6, mount_setattr with 5.12.
OLDEST_KERNEL = (5, 12)
# Only from here on the kernel tells how a process ended to somebody who is not its parent (PIDFD_GET_INFO).
EXIT_INFO_KERNEL = (6, 15)
NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user", "time")
NEEDED_NAMESPACES = frozenset(NAMESPACES) - {"user", "time"}
NEEDED_CONTROLLERS = ("cpu", "memory", "pids")
NEEDED_CAPABILITIES = ("SYS_ADMIN", "NET_ADMIN", "SETUID", "SETGID", "CHOWN", "MKNOD", "SYS_CHROOT", "KILL", "SETPCAP")
GROUP = "corral"


def check_host(root: Path, state: Path) -> list[Check]:
    """All checks, in the order in which they matter. `root` and `state` are this engine's directories."""
    checks: list[Check] = []
    for check in _CHECKS:
        checks += check()
    return [*checks, *_directory_checks(root, state)]


def _check(name: str, result: "Check.Result.ValueType", detail: str, remedy: str = "") -> Check:
    return Check(name=name, result=result, detail=detail, remedy="" if result == OK else remedy)


def check_kernel(release: str = "") -> list[Check]:
    """Whether the kernel is new enough."""
    release = release or platform.release()
    version = kernel_version(release)
    if version < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        return [_check("kernel", MISSING, f"Linux {release}", f"boot Linux {oldest} or newer")]
    if version < EXIT_INFO_KERNEL:
        return [
            _check(
                "kernel",
                WARNING,
                f"Linux {release}: the exit code of a container whose shim was killed cannot be known",
                "boot Linux 6.15 or newer if that matters to you",
            )
        ]
    return [_check("kernel", OK, f"Linux {release}")]


def check_privileges() -> list[Check]:
    """Whether we may do what containers need."""
    if os.geteuid() != 0:
        return [_check("privileges", MISSING, f"running as uid {os.geteuid()}", "run corrald as root")]
    held = set(capabilities.names_of(capabilities.effective()))
    lacking = [name for name in NEEDED_CAPABILITIES if f"CAP_{name}" not in held]
    if lacking:
        return [_check("privileges", MISSING, f"root without {', '.join(lacking)}", "give corrald these capabilities")]
    if "CAP_SYS_RESOURCE" not in held:
        return [
            _check(
                "privileges",
                WARNING,
                "root without SYS_RESOURCE: hard resource limits cannot be raised, nor OOM scores lowered",
                "give corrald CAP_SYS_RESOURCE; until then such limits are clamped",
            )
        ]
    return [_check("privileges", OK, "root")]


def check_namespaces(proc: Path = Path("/proc")) -> list[Check]:
    """Which kinds of namespaces the kernel has."""
    present = {name for name in NAMESPACES if (proc / "self/ns" / name).exists()}
    missing = [name for name in NAMESPACES if name in NEEDED_NAMESPACES and name not in present]
    detail = ", ".join(name for name in NAMESPACES if name in present)
    remedy = f"boot a kernel with the namespaces {', '.join(missing)}"
    return [_check("namespaces", MISSING if missing else OK, detail or "none", remedy)]


def check_filesystems(proc: Path = Path("/proc")) -> list[Check]:
    """overlayfs, of which images are stacked. A module counts as present when it can be loaded."""
    known = (proc / "filesystems").read_text().split()
    if "overlay" in known:
        return [_check("overlayfs", OK, "in the kernel")]
    if _has_module("overlay"):
        return [_check("overlayfs", WARNING, "a module that is not loaded", "modprobe overlay")]
    return [_check("overlayfs", MISSING, "not in this kernel", "boot a kernel with CONFIG_OVERLAY_FS")]


def _has_module(name: str) -> bool:
    directory = Path("/lib/modules", platform.release())
    for index in ("modules.builtin", "modules.dep"):
        with suppress(OSError):
            if re.search(rf"/{name}\.ko", (directory / index).read_text()):
                return True
    return False


def check_cgroups() -> list[Check]:
    """Layout and controllers."""
    try:
        layout = detect()
    except OSError as e:
        return [_check("cgroups", MISSING, str(e), "mount cgroup2: mount -t cgroup2 none /sys/fs/cgroup")]
    kind = layout.kind.value
    if all(hierarchy.read_only for hierarchy in layout.hierarchies):
        return [_check("cgroups", MISSING, f"{kind}, read-only", "run corrald on the host itself")]
    missing = [name for name in NEEDED_CONTROLLERS if layout.of(name) is None]
    if missing:
        return [
            _check(
                "cgroups",
                WARNING,
                f"{kind}, without {', '.join(missing)}: their limits cannot be set",
                "enable the controllers (kernel command line: cgroup_enable=memory; systemd: Delegate=yes)",
            )
        ]
    names = sorted(name for hierarchy in layout.hierarchies for name in hierarchy.controllers)
    return [_check("cgroups", OK, f"{kind}: {', '.join(names)}")]


def check_seccomp(proc: Path = Path("/proc")) -> list[Check]:
    """Filters on system calls."""
    actions = proc / "sys/kernel/seccomp/actions_avail"
    with suppress(OSError):
        return [_check("seccomp", OK, actions.read_text().strip())]
    return [_check("seccomp", MISSING, "not in this kernel", "boot a kernel with CONFIG_SECCOMP_FILTER")]


def check_network() -> list[Check]:
    """What the bridge network is made of: nftables, bridges, veth pairs, forwarding."""
    return [_check_nftables(), *_check_links(), _check_forwarding()]


def _check_nftables() -> Check:
    NETLINK_NETFILTER = 12  # noqa: N806 - linux/netlink.h
    places = ("/usr/lib/*", "/usr/lib64", "/usr/lib", "/lib/*", "/lib")
    library = next((path for place in places for path in Path("/").glob(f"{place[1:]}/libnftables.so.1")), None)
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER).close()
    except OSError as e:
        return _check("nftables", MISSING, f"netlink: {e.strerror}", "boot a kernel with CONFIG_NF_TABLES")
    if library is None:
        return _check("nftables", MISSING, "the library libnftables is not installed", "apt install libnftables1")
    return _check("nftables", OK, str(library))


def _check_links() -> Iterator[Check]:
    for name, module in (("bridge", "bridge"), ("veth", "veth")):
        built_in = Path("/sys/module", module).exists() or _has_module(module) or _any_link(name)
        if built_in or not Path("/lib/modules", platform.release()).exists():
            yield _check(name, OK, "available" if built_in else "not listed as a module: taken as built in")
        else:
            yield _check(name, MISSING, "not in this kernel", f"boot a kernel with {name} interfaces")


def _any_link(kind: str) -> bool:
    return any(Path("/sys/class/net").glob(f"*/{kind}"))


def _check_forwarding() -> Check:
    with suppress(OSError):
        if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1":
            return _check("ip_forward", OK, "on")
        return _check(
            "ip_forward", WARNING, "off; corral turns it on for its first network", "sysctl net.ipv4.ip_forward=1"
        )
    return _check("ip_forward", MISSING, "no IPv4", "boot a kernel with CONFIG_INET")


def check_security() -> list[Check]:
    """Linux security modules, where they are."""
    with suppress(OSError):
        names = Path("/sys/kernel/security/lsm").read_text().strip()
        return [_check("security modules", OK, names)]
    return [_check("security modules", OK, "none are shown (securityfs is not mounted)")]


def check_group() -> list[Check]:
    """The group whose members may use the socket."""
    try:
        grp.getgrnam(GROUP)
    except KeyError:
        return [
            _check(
                "group corral",
                WARNING,
                "there is no such group: only root can use the socket",
                "groupadd --system corral, then usermod -aG corral USER",
            )
        ]
    return [_check("group corral", OK, "exists")]


_CHECKS: Sequence[Callable[[], list[Check]]] = (
    check_kernel,
    check_privileges,
    check_namespaces,
    check_filesystems,
    check_cgroups,
    check_seccomp,
    check_network,
    check_security,
    check_group,
)


def _directory_checks(root: Path, state: Path) -> list[Check]:
    return [_check_space("data directory", root), _check_space("run directory", state)]


def _check_space(name: str, path: Path) -> Check:
    existing = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    try:
        status = os.statvfs(existing)
    except OSError as e:
        return _check(name, MISSING, f"{path}: {errno.errorcode.get(e.errno or 0, e)}", "give another directory")
    free = status.f_bavail * status.f_frsize
    if status.f_flag & os.ST_RDONLY:
        return _check(name, MISSING, f"{path} is read-only", "give a directory that can be written")
    if free < 256 << 20:
        return _check(name, WARNING, f"{path}: only {free >> 20} MiB free", "make room, or give another directory")
    return _check(name, OK, f"{path}: {free >> 20} MiB free")


def operating_system(etc: Path = Path("/etc")) -> str:
    """As the distribution calls itself."""
    with suppress(OSError):
        for line in (etc / "os-release").read_text().splitlines():
            if line.startswith("PRETTY_NAME="):
                return line.partition("=")[2].strip("\"'")
    return platform.system()


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def security_features() -> list[str]:
    """What protects containers here besides namespaces: "seccomp", and the security modules that are active."""
    found = ["seccomp"] if Path("/proc/sys/kernel/seccomp").exists() else []
    with suppress(OSError):
        names = Path("/sys/kernel/security/lsm").read_text().strip().split(",")
        found += [name for name in names if name in ("apparmor", "selinux", "landlock", "smack", "tomoyo")]
    return found
