"""Kernel parameters of the container's namespaces, written through a procfs that nobody else has touched.

Source: runtime-spec config-linux.md "sysctl".
"""

import os
from collections.abc import Iterable, Mapping

from corral.kernel import paths
from corral.kernel.mount import clone_tree, new_mount
from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import PROC_SUPER_MAGIC, filesystem_magic
from corral.oci.errors import SETUP, ExecFailed

_IPC = frozenset(
    "kernel/" + name for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
)


def check_sysctl(sysctl: Mapping[str, str], kinds: Iterable[Kind]) -> dict[str, str]:
    """The parameters by their path under /proc/sys; ValueError for one that is the whole host's."""
    own = set(kinds)
    checked = {}
    for name, value in sysctl.items():
        path = sysctl_path(name)
        kind = _kind_of(path)
        if kind is None:
            raise ValueError(f"linux.sysctl.{name}: it belongs to the host, not to a namespace")
        if kind not in own:
            raise ValueError(f"linux.sysctl.{name}: the container shares the host's {kind.value} namespace")
        checked[path] = value
    return checked


def sysctl_path(name: str) -> str:
    """`net.ipv4.conf.eth0/100.forwarding` or `net/ipv4/…` as a path: the first separator tells which is which."""
    first = next((c for c in name if c in "./"), ".")
    path = name if first == "/" else name.translate(str.maketrans("./", "/."))
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"linux.sysctl.{name}: not the name of a parameter")
    return path


def _kind_of(path: str) -> Kind | None:
    if path.startswith("net/"):
        return Kind.NETWORK
    if path in _IPC or path.startswith("fs/mqueue/"):
        return Kind.IPC
    if path == "kernel/domainname":
        return Kind.UTS
    if path.startswith("user/"):
        return Kind.USER
    return None


def write_sysctl(sysctl: Mapping[str, str], root: int | None = None) -> None:
    """Write parameters, by path, in the namespaces of the caller.

    root: of the container, whose procfs will do where a new one can't be made.
    """
    if not sysctl:
        return
    with paths.opened(_procfs(root)) as procfs:
        for path, value in sysctl.items():
            try:
                resolve = paths.RESOLVE_BENEATH | paths.RESOLVE_NO_SYMLINKS
                with paths.opened(paths.openat2(procfs, f"sys/{path}", os.O_WRONLY, resolve=resolve)) as fd:
                    os.write(fd, value.encode())
            except OSError as e:
                raise ExecFailed(SETUP, f"sysctl {path}={value}: {(e.strerror or str(e)).lower()}") from e


def _procfs(root: int | None) -> int:
    try:
        return new_mount("proc", "proc")
    except PermissionError:  # the PID namespace belongs to another user namespace
        if root is None:
            raise
    flags = os.O_PATH | os.O_DIRECTORY
    with paths.opened(paths.open_in_root(root, "proc", flags, resolve=paths.RESOLVE_NO_SYMLINKS)) as proc:
        if filesystem_magic(proc) != PROC_SUPER_MAGIC or os.fstat(proc).st_ino != _ROOT_INODE:
            raise ExecFailed(SETUP, "sysctl: what is mounted on /proc is not a procfs")
        # Without what was mounted over parts of it to make them read-only.
        return clone_tree(proc)


_ROOT_INODE = 1
