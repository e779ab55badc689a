"""Snapshotters: one module per union or copying file system."""

from collections.abc import Callable, Mapping
from pathlib import Path

from corral.images.drivers.overlayfs import Overlayfs
from corral.images.snapshotter import Snapshotter

# Name -> maker, given the directory that is the driver's own.
DRIVERS: Mapping[str, Callable[[Path], Snapshotter]] = {
    "overlayfs": Overlayfs,
}
DIRECTORIES: Mapping[str, str] = {"overlayfs": "overlay"}


def make_driver(name: str, root: Path) -> Snapshotter:
    """The driver called `name`, with its directory below `root`. Raises KeyError."""
    return DRIVERS[name](root / DIRECTORIES[name])
