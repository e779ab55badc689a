"""The procfs of a PID namespace that the mounting process is not in.

A procfs shows the processes of its maker's PID namespace. To enter a joined one just for that would show a fully
privileged process to all who live there, and to their CAP_SYS_PTRACE (CVE-2016-9962). From Linux 6.18 on the namespace
can be named; before, a copy of the mount that its members have does.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import islice

from corral.kernel import mount, namespaces, paths, process
from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import AT_FDCWD, PROC_SUPER_MAGIC, filesystem_magic
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.stage import PidNamespace

_PROC_ROOT_INODE = 1
_TRIES = 16


def new_procfs(pids: PidNamespace, source: str, options: Sequence[str]) -> int:
    """A detached procfs that shows a PID namespace. Raises ExecFailed where this kernel has no way to it, OSError."""
    try:
        return mount.new_mount("proc", source or "proc", options, descriptors={"pidns": pids.fd})
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    return copy_procfs(pids)


def copy_procfs(pids: PidNamespace) -> int:
    """A detached copy of the /proc of a process in the namespace, without what is mounted over parts of it.

    Whose /proc it is has a say in what lies there: so what was found is checked, and is kept if it shows the namespace.
    """
    for pid in islice(_members(pids.fd), _TRIES):
        try:
            tree = _copy_from(pid)
        except OSError:  # it has ended, or has nothing there
            continue
        if _is_whole_procfs(tree) and _shows(tree, pids.fd):
            return tree
        os.close(tree)
    raise ExecFailed(SETUP, f"mount /proc: before Linux 6.18, somebody in {pids.path} must have a procfs on /proc")


def _members(namespace: int) -> Iterator[int]:
    """Processes that are right in a PID namespace, the oldest first."""
    own = os.fstat(namespace)
    for pid in sorted(int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal()):
        try:
            if os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), own):  # noqa: PTH116 - pathlib takes long to load
                yield pid
        except OSError:
            continue


def _copy_from(pid: int) -> int:
    flag = Kind.MOUNT.flag
    with (
        paths.opened(namespaces.open_namespace("/proc/self/ns/mnt")) as own,
        paths.opened(process.pidfd_open(pid)) as holder,
    ):
        namespaces.join(holder, flag, what=f"process {pid}")
        try:
            return mount.clone_tree(AT_FDCWD, "/proc")
        finally:
            namespaces.join(own, flag)


def _is_whole_procfs(tree: int) -> bool:
    status = os.fstat(tree)
    return (
        filesystem_magic(tree) == PROC_SUPER_MAGIC
        and stat.S_ISDIR(status.st_mode)
        and status.st_ino == _PROC_ROOT_INODE
    )


def _shows(tree: int, namespace: int) -> bool:
    try:
        return os.path.samestat(os.stat("1/ns/pid", dir_fd=tree), os.fstat(namespace))
    except OSError:
        return False
