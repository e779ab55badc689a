"""Drivers that other engines have and this one has not: why each is not to be had here, and what to use instead."""

from collections.abc import Callable, Mapping

from corral.images.drivers.places import kernel_has


def _aufs() -> str:
    if not kernel_has("aufs"):
        return "this kernel has no aufs: use overlayfs"
    return "corral stacks layers by overlayfs, which every kernel that has aufs has as well: use that"


ABSENT: Mapping[str, Callable[[], str]] = {"aufs": _aufs}
