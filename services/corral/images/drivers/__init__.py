"""Snapshotters: one module per union or copying file system, and who has which of their trees.

New trees are made with one driver, the default. Trees that another one made here before, when the setting was another,
stay what they are: usable and removable, until their containers are gone.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from corral.images.drivers.aufs import Aufs
from corral.images.drivers.blockfile import Blockfile
from corral.images.drivers.btrfs import Btrfs
from corral.images.drivers.devicemapper import Devicemapper
from corral.images.drivers.erofs import Erofs
from corral.images.drivers.fuse_overlayfs import FuseOverlayfs
from corral.images.drivers.native import Native
from corral.images.drivers.overlayfs import Overlayfs
from corral.images.layers.removal import GoOn, always
from corral.images.snapshotter import Snapshotter, TreeId, Work
from corral.rpc.errors import FailedPrecondition

# Name -> maker, given the directory that is the driver's own, and somebody who does what takes long.
DRIVERS: Mapping[str, Callable[[Path, Work], Snapshotter]] = {
    "overlayfs": Overlayfs,
    "native": Native,
    "btrfs": Btrfs,
    "erofs": Erofs,
    "blockfile": Blockfile,
    "devicemapper": Devicemapper,
    "fuse-overlayfs": FuseOverlayfs,
    "aufs": Aufs,
}
DIRECTORIES: Mapping[str, str] = {"overlayfs": "overlay"}


def make_driver(
    name: str, root: Path, work: Work, makers: Mapping[str, Callable[[Path, Work], Snapshotter]] = DRIVERS
) -> Snapshotter:
    """The driver called `name`, with its directory below `root`. Raises KeyError."""
    return makers[name](root / DIRECTORIES.get(name, name), work)


def on_devices(data: str, metadata: str) -> Mapping[str, Callable[[Path, Work], Snapshotter]]:
    """DRIVERS, with these for the thin pool; empty: instead files of its own."""
    on, counted_on = (Path(path) if path else None for path in (data, metadata))
    return {**DRIVERS, "devicemapper": partial(Devicemapper, data=on, metadata=counted_on)}


class Drivers:
    """All drivers, and which of them have trees below one root."""

    def __init__(
        self,
        root: Path,
        default: str,
        work: Work,
        makers: Mapping[str, Callable[[Path, Work], Snapshotter]] = DRIVERS,
    ) -> None:
        """Raises FailedPrecondition if the default does not exist, or cannot run there."""
        if default not in DRIVERS:
            raise FailedPrecondition(f"there is no snapshot driver {default!r}; there is {', '.join(DRIVERS)}")
        self._all = {name: make_driver(name, root, work, makers) for name in DRIVERS}
        self.default = self._all[default]
        self._directories = {name: root / DIRECTORIES.get(name, name) for name in DRIVERS}
        if reason := self.default.check():
            raise _unusable(default, reason)

    def open(self) -> None:
        """Make what the drivers that have trees here, and the default, need below their directories."""
        for driver in self:
            driver.open()

    def close(self) -> None:
        """Let go of what the kernel holds for them and nobody uses."""
        for driver in self:
            driver.close()

    def __iter__(self) -> Iterator[Snapshotter]:
        """The default, and those that have made trees here."""
        yield self.default
        for name, driver in self._all.items():
            if driver is not self.default and self._directories[name].is_dir():
                yield driver

    def of(self, name: str) -> Snapshotter:
        """The driver that made a tree. Raises FailedPrecondition if it cannot run here any more."""
        if name == self.default.name:
            return self.default
        driver = self._all.get(name)
        reason = "this version of corral does not have it" if driver is None else driver.check()
        if driver is None or reason:
            raise FailedPrecondition(
                f"snapshot driver {name}, which made this, cannot be used: {reason}", reason="DRIVER_UNUSABLE"
            )
        return driver

    def remove(self, tree: TreeId, *, go_on: GoOn = always) -> None:
        """Remove a tree, whoever made it; their numbers are unique. Raises OSError."""
        for driver in self:
            driver.remove(tree, go_on=go_on)

    def reasons(self) -> Mapping[str, str]:
        """By name why each cannot run on this host; empty if it can."""
        return {name: driver.check() for name, driver in self._all.items()}


def _unusable(name: str, reason: str) -> FailedPrecondition:
    return FailedPrecondition(f"snapshot driver {name} cannot be used: {reason}", reason="DRIVER_UNUSABLE")
