"""Labels of the kernel's security modules: AppArmor's profile, SELinux's context.

A process writes the label it wants to its own attributes in procfs, and gets it at its next exec. The file is opened
while only the host's procfs is in sight, for in a container that may be anything (CVE-2019-16884, CVE-2025-52881). A
write is good only from the process that opened the file, but what was written is inherited over fork.
Sources: apparmor(7), aa_change_onexec(2), setexeccon(3).
"""

import os
from pathlib import Path

from corral.kernel.syscalls import failure, filesystem_magic

_SELINUX_MAGIC = 0xF97CFF8C
_SELINUX = Path("/sys/fs/selinux")
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_OWN = "/proc/thread-self/attr"


def has_apparmor() -> bool:
    """Whether AppArmor is this kernel's, and switched on."""
    try:
        return _APPARMOR.read_text("ascii").startswith("Y")
    except OSError:
        return False


def has_selinux() -> bool:
    """Whether SELinux is this kernel's, and switched on: then its file system is mounted."""
    try:
        fd = os.open(_SELINUX, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return filesystem_magic(fd) & 0xFFFFFFFF == _SELINUX_MAGIC
    finally:
        os.close(fd)


def open_apparmor() -> int:
    """An fd of what set_profile() writes to; to be opened in the host's view."""
    try:
        return os.open(f"{_OWN}/apparmor/exec", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # before Linux 5.8 all modules shared one
        return os.open(f"{_OWN}/exec", os.O_WRONLY | os.O_CLOEXEC)


def open_selinux() -> int:
    """An fd of what set_context() writes to; to be opened in the host's view."""
    return os.open(f"{_OWN}/exec", os.O_WRONLY | os.O_CLOEXEC)


def set_profile(fd: int, profile: str) -> None:
    """Be confined by this AppArmor profile from the next exec on. Raises OSError(ENOENT) if none is loaded."""
    _write(fd, f"exec {profile}", f"AppArmor profile {profile!r}")


def set_context(fd: int, context: str) -> None:
    """Have this SELinux context from the next exec on. Raises OSError(EINVAL) for one that the policy does not know."""
    _write(fd, context, f"SELinux context {context!r}")


def open_key_label() -> int:
    """An fd of what label_new_keys() writes to; to be opened in the host's view."""
    return os.open(f"{_OWN}/keycreate", os.O_WRONLY | os.O_CLOEXEC)


def label_new_keys(fd: int, context: str) -> None:
    """Keyrings made from here on have this SELinux context; "" for the usual one."""
    # An empty write would not get through to the kernel's function: a newline stands for it.
    _write(fd, context or "\n", f"SELinux context {context!r} of keys")


def _write(fd: int, text: str, what: str) -> None:
    try:
        os.write(fd, text.encode())
    except OSError as e:
        raise failure(e.errno or 0, "set a label", what) from e
