"""The cgroup of a container: which one, and under which conditions it is taken."""

import contextlib
import errno
import os

from corral.kernel.cgroup import Cgroup, Driver, detect
from corral.oci.limits import limits_of
from corral.oci.spec import Linux
from corral.runtime.errors import CommandError

DEFAULT_PARENT = "/corral-oci"
"""Where relative paths, and containers without one, go: never to where the caller happens to be."""


def path_of(linux: Linux, container_id: str) -> str:
    """The path of a container's cgroup in every hierarchy. Raises CommandError for one that leads elsewhere."""
    wanted = linux.cgroups_path
    if wanted.count(":") == 2 and "/" not in wanted:
        raise CommandError(f"linux.cgroupsPath: {wanted!r} is for systemd, which is not asked here: use a path")
    path = wanted if wanted.startswith("/") else f"{DEFAULT_PARENT}/{wanted or container_id}"
    normal = "/" + os.path.normpath(path).lstrip("/")
    if ".." in path.split("/") or normal == "/":
        raise CommandError(f"linux.cgroupsPath: {wanted!r} does not name a cgroup below the root")
    return normal


def make(linux: Linux, path: str) -> Cgroup | None:
    """Make the cgroup with its limits, or take over an empty one. None where an ordinary user may make none.

    Processes that are there already would share the limits and be killed with the container, and in a frozen one
    nothing would start: both are refused.
    """
    driver = Driver(detect())
    limits = limits_of(linux.resources)
    try:
        try:
            return driver.create(path, limits)
        except FileExistsError:
            group = driver.open(path)
        if pids := group.pids():
            raise CommandError(f"container's cgroup {path} is not empty: {len(pids)} process(es) found")
        if group.is_frozen():
            raise CommandError(f"container's cgroup {path} is unexpectedly frozen")
        return driver.create(path, limits, adopt=True)
    except OSError as e:
        if os.geteuid() != 0 and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return None
        raise


def remove_empty(path: str) -> None:
    """Remove what a create that was killed may have made, unless somebody is in there: that is another container's."""
    for directory in Driver(detect()).open(path).paths():
        with contextlib.suppress(OSError):
            os.rmdir(directory)  # noqa: PTH106 - whatever kind of path it is


def remove(path: str) -> None:
    """Remove a cgroup with whatever is left in it, and our own parent of it once that is empty."""
    driver = Driver(detect())
    driver.open(path).remove()
    if path.startswith(f"{DEFAULT_PARENT}/"):
        with contextlib.suppress(OSError):
            driver.prune(path.rpartition("/")[0])
