"""Mounts that nearly every container has, made before it is known which container it will be.

Whoever waits for an order (a spare shim) stocks a larder meanwhile, with detached mounts that depend on no namespace.
Each is kept under the step that would make it, so that a plan with an equal step is served; one that asks for anything
else makes its own, as all do without a larder. All that tells them apart is the order of lines in mountinfo, which is
by age.

These mounts are new and were never attached anywhere: nobody has seen them but their maker and the one init that takes
them. What init does not take is closed with all the rest.
"""

import os
from collections.abc import Collection

from corral.oci import defaults
from corral.oci.cgroup_mounts import hierarchies_key, new_hierarchies
from corral.oci.devices import DEFAULT_DEVICES, DEFAULT_LINKS, DeviceNode, make_default_devices
from corral.oci.masks import EMPTY_DIRECTORY, new_empty_directory
from corral.oci.mounts import BindMount, NewFilesystem
from corral.oci.plan import mount_step
from corral.oci.stage import Stage, Step, normal

_CGROUPS = "/sys/fs/cgroup"
_DEV, *_BELOW_DEV = (mount_step(mount) for mount in defaults.MOUNTS if normal(mount.destination).startswith("/dev"))
_PLACES = frozenset(step.destination.removeprefix("/dev/") for step in _BELOW_DEV)
# Not mqueue: it shows the queues of its maker's namespace.
_AHEAD = tuple(step for step in _BELOW_DEV if step.fstype != "mqueue")
_DEFAULT_NAMES = frozenset(device.path.removeprefix("/dev/") for device in DEFAULT_DEVICES) | DEFAULT_LINKS.keys()


class Larder:
    """What one container can be served with."""

    def __init__(self) -> None:
        self._trees: dict[Step | str, int] = {}

    def stock(self) -> None:
        """Make the mounts. Raises OSError where the host does not allow it; what was made by then is good."""
        umask = os.umask(0)
        try:
            dev = _DEV.new()
            self._trees[_DEV] = dev
            make_default_devices(dev)
            for name in sorted(_PLACES):
                os.mkdir(name, 0o755, dir_fd=dev)
        finally:
            os.umask(umask)
        for step in _AHEAD:
            self._trees[step] = step.new()
        self._trees[EMPTY_DIRECTORY] = new_empty_directory()
        if names := _hierarchies():
            self._trees[hierarchies_key(names)] = new_hierarchies(names)

    @property
    def fds(self) -> list[int]:
        """All that is open, for the list of fds to keep."""
        return list(self._trees.values())

    def serve(self, stage: Stage, steps: Collection[Step]) -> None:
        """Put on the stage what the steps may take."""
        stage.ready = self._trees.copy()
        stage.ready_places_in_dev = _PLACES
        if not _has_usual_dev(steps):
            stage.ready.pop(_DEV, None)

    def close(self) -> None:
        """Let go of everything; it is empty then."""
        for fd in self.fds:
            os.close(fd)
        self._trees.clear()


def _has_usual_dev(steps: Collection[Step]) -> bool:
    """Whether every directory in the /dev that is ready gets its mount, and no default name is taken by another."""
    mounts = {normal(step.destination) for step in steps if isinstance(step, NewFilesystem | BindMount)}
    devices = {normal(step.device.path) for step in steps if isinstance(step, DeviceNode)}
    return {f"/dev/{name}" for name in _PLACES} <= mounts and not any(
        f"/dev/{name}" in mounts or f"/dev/{name}" in devices for name in _DEFAULT_NAMES
    )


def _hierarchies() -> list[str]:
    """The names of this host's v1 hierarchies and of the v2 one beside them."""
    if os.path.exists(f"{_CGROUPS}/cgroup.controllers"):  # noqa: PTH110 - v2 alone; pathlib takes long to load
        return []
    return sorted(entry.name for entry in os.scandir(_CGROUPS) if entry.is_dir(follow_symlinks=False))
