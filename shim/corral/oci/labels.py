"""The labels that security modules are to know a container's processes by.

What the kernel lacks is refused: a container that was to be confined must not run without.
"""

import os

from corral.kernel import labels
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.spec import Process


def check_labels(process: Process, path: str = "process") -> None:
    """Raise ValueError that begins with the JSON path of a label that this kernel can't give."""
    if process.apparmor_profile and not labels.has_apparmor():
        raise ValueError(f"{path}.apparmorProfile: this kernel has no AppArmor, or it is switched off")
    if process.selinux_label and not labels.has_selinux():
        raise ValueError(f"{path}.selinuxLabel: this kernel has no SELinux, or it is switched off")


def check_mount_label(label: str) -> None:
    """The same for linux.mountLabel."""
    if label and not labels.has_selinux():
        raise ValueError("linux.mountLabel: this kernel has no SELinux, or it is switched off")


class Labels:
    """What the next exec of a process is labelled with. Belongs to the one process that uses it."""

    __slots__ = ("_apparmor", "_fds", "_selinux")

    def __init__(self, apparmor: str, selinux: str) -> None:
        self._apparmor, self._selinux = apparmor, selinux
        self._fds: list[int] = []

    def take_hold(self) -> None:
        """Open what apply() will write to, while nothing but the host's procfs is in sight."""
        self._fds = [labels.open_apparmor() if self._apparmor else -1, labels.open_selinux() if self._selinux else -1]

    def label_keyrings(self, *, yes: bool) -> None:
        """Whether keyrings that are made from here on are the container's."""
        if self._selinux:
            labels.label_new_keys(self._selinux if yes else "")

    def apply(self) -> None:
        """Have the labels from the next exec on. Raises ExecFailed for one that isn't known."""
        apparmor, selinux = self._fds
        try:
            if apparmor >= 0:
                labels.set_profile(apparmor, self._apparmor)
            if selinux >= 0:
                labels.set_context(selinux, self._selinux)
        except OSError as e:
            raise ExecFailed(SETUP, f"{e.filename or ''}: {e.strerror or e}".removeprefix(": ")) from e
        for fd in self._fds:
            if fd >= 0:
                os.close(fd)
        self._fds = []


def labels_of(process: Process) -> Labels | None:
    """The labels a process asks for; None is none."""
    if not process.apparmor_profile and not process.selinux_label:
        return None
    return Labels(process.apparmor_profile, process.selinux_label)
