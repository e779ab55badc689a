"""The labels that security modules are to know a container's processes by.

What the kernel lacks is refused: a container that was to be confined must not run without.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from corral.kernel import labels, paths
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.image_mounts import ImageMount
from corral.oci.mount_options import MountOptions
from corral.oci.mounts import NewFilesystem, RootFilesystem
from corral.oci.secret_files import SecretFiles
from corral.oci.spec import Process
from corral.oci.stage import Stage, Step


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


def labelled(steps: Iterable[Step], label: str) -> list[Step]:
    """The steps of a container, its own file systems with linux.mountLabel as their SELinux context."""
    found: list[Step] = []
    for step in steps:
        if isinstance(step, NewFilesystem) and step.fstype == "mqueue":
            found += [step, LabelledQueues(step.destination, label)]
        elif isinstance(step, NewFilesystem | RootFilesystem):
            found.append(replace(step, options=_labelled(step.options, step.fstype, label)))
        elif isinstance(step, ImageMount):
            tree = step.tree
            found.append(replace(step, tree=replace(tree, options=_labelled(tree.options, tree.fstype, label))))
        elif isinstance(step, SecretFiles):
            found.append(replace(step, context=label))
        else:
            found.append(step)
    return found


def _labelled(options: MountOptions, fstype: str, label: str) -> MountOptions:
    if options.bind or fstype in _OWN_LABELS:
        return options
    return replace(options, data=(*options.data, f"context={label}"))


_OWN_LABELS = frozenset(("proc", "sysfs", "cgroup", "cgroup2"))
"""The policy says how these are labelled."""


@dataclass(frozen=True, slots=True)
class LabelledQueues(Step):
    """Label a mqueue: it belongs to its namespace, which was there before it was mounted, so it takes no context."""

    destination: str
    label: str

    def describe(self) -> str:
        return f"{self.destination}: labelled {self.label}"

    def apply(self, stage: Stage) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY
        with paths.opened(paths.open_in_root(stage.root, self.destination, flags)) as fd:
            os.setxattr(fd, "security.selinux", self.label.encode() + b"\0")


class Labels:
    """What the next exec of a process is labelled with. Belongs to the one process that uses it."""

    __slots__ = ("_apparmor", "_fds", "_keys", "_selinux")

    def __init__(self, apparmor: str, selinux: str) -> None:
        self._apparmor, self._selinux = apparmor, selinux
        self._fds: list[int] = []
        self._keys = -1

    def take_hold(self) -> None:
        """Open what the rest will write to, while nothing but the host's procfs is in sight."""
        if self._selinux:
            self._keys = labels.open_key_label()
        self._fds = [labels.open_apparmor() if self._apparmor else -1, labels.open_selinux() if self._selinux else -1]

    def take_hold_again(self, *, hosts_procfs: bool) -> None:
        """The same for a child, for which what its parent opened is of no use.

        hosts_procfs: it still is in sight. Raises ExecFailed if not.
        """
        if not hosts_procfs:
            member = "process.apparmorProfile" if self._apparmor else "process.selinuxLabel"
            raise ExecFailed(
                SETUP, f"{member}: can't be had in a user namespace together with a joined mount namespace"
            )
        self.close()
        self.take_hold()

    def close(self) -> None:
        """Let go."""
        for fd in (*self._fds, self._keys):
            if fd >= 0:
                os.close(fd)
        self._fds, self._keys = [], -1

    def label_keyrings(self, *, yes: bool) -> None:
        """Whether keyrings that are made from here on are the container's."""
        if self._selinux:
            labels.label_new_keys(self._keys, self._selinux if yes else "")

    def apply(self) -> None:
        """Have the labels from the next exec on. Raises ExecFailed for one that isn't known."""
        apparmor, selinux = self._fds
        member = "process.apparmorProfile"
        try:
            if apparmor >= 0:
                labels.set_profile(apparmor, self._apparmor)
            member = "process.selinuxLabel"
            if selinux >= 0:
                labels.set_context(selinux, self._selinux)
        except OSError as e:
            raise ExecFailed(SETUP, f"{member}: {e.filename}: {e.strerror}") from e
        self.close()


def labels_of(process: Process) -> Labels | None:
    """The labels a process asks for; None is none."""
    if not process.apparmor_profile and not process.selinux_label:
        return None
    return Labels(process.apparmor_profile, process.selinux_label)
