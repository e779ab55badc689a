"""The cgroup of a container: which one, and under which conditions it is taken."""

import contextlib
import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from corral.kernel.cgroup import Cgroup, Driver, Resources, detect
from corral.kernel.cgroup.plans import limited_by
from corral.kernel.privilege import is_hosts_root
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.state import Record

if TYPE_CHECKING:
    from corral.oci.spec import Linux

DEFAULT_PARENT = "/corral-oci"
"""Where relative paths, and containers without one, go: never to where the caller happens to be."""

_OUT_OF_REACH = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT))
"""The last one: no cgroup file system is mounted."""


def path_of(linux: "Linux", container_id: str) -> str:
    """The path of a container's cgroup in every hierarchy. Raises CommandError for one that leads elsewhere."""
    wanted = linux.cgroups_path
    if wanted.count(":") == 2 and "/" not in wanted:
        raise CommandError(f"linux.cgroupsPath: {wanted!r} is for systemd: use a path, or give --systemd-cgroup")
    path = wanted if wanted.startswith("/") else f"{DEFAULT_PARENT}/{wanted or container_id}"
    normal = "/" + os.path.normpath(path).lstrip("/")
    if ".." in path.split("/") or normal == "/":
        raise CommandError(f"linux.cgroupsPath: {wanted!r} does not name a cgroup below the root")
    return normal


def make(context: Context, linux: "Linux", path: str) -> Cgroup | None:
    """Make the cgroup with its limits, or take over an empty one.

    None where --rootless forgives that it may not be made: if config.json has neither a path for it nor a limit.
    Raises CommandError naming the limits that can't be had otherwise.
    """
    from corral.oci.limits import limits_of  # only who makes a cgroup needs it

    limits = limits_of(linux.resources)
    if not is_hosts_root():
        # To rule devices takes the host's privilege. Whoever lacks that can make none, and the host's have their modes.
        limits = replace(limits, devices=None)
    if not context.with_cgroups:
        _refuse(limits, "cgroups are disabled")
        return None
    try:
        group = _make(limits, path)
    except OSError as e:
        if not context.rootless or e.errno not in _OUT_OF_REACH:
            raise
        _refuse(limits, f"this user can't make a cgroup: {(e.strerror or str(e)).lower()}: {e.filename}", e)
        if linux.cgroups_path:
            raise
        return None
    return group if group.directories else None


def _refuse(limits: Resources, why: str, cause: OSError | None = None) -> None:
    if asked := limited_by(limits):
        raise CommandError(f"cannot set {' and '.join(asked)} limits (linux.resources): {why}") from cause


def _make(limits: Resources, path: str) -> Cgroup:
    """Processes that are there already would share the limits and be killed with the container, and in a frozen one
    nothing would start: both are refused.
    """
    driver = Driver(detect(), lenient=True)
    try:
        return driver.create(path, limits)
    except FileExistsError:
        group = driver.open(path)
    if pids := group.pids():
        raise CommandError(f"container's cgroup is not empty: {len(pids)} process(es) found in {path}")
    if group.is_frozen():
        raise CommandError(f"container's cgroup unexpectedly frozen: {path}")
    return driver.create(path, limits, adopt=True)


def remove_of(record: Record) -> None:
    """Remove the cgroup of a container, whoever made it."""
    if record.unit:
        from corral.runtime import units

        units.remove(record)
    else:
        remove(record.cgroup)


def remove_empty(record: Record) -> None:
    """Remove what a create that was killed may have made, unless somebody is in there: that is another container's."""
    if record.unit:
        from corral.runtime import units

        units.forget(record)
    for directory in Driver(detect()).open(record.cgroup).paths():
        with contextlib.suppress(OSError):
            os.rmdir(directory)  # noqa: PTH106 - whatever kind of path it is


def remove(path: str) -> None:
    """Remove a cgroup with whatever is left in it, and our own parent of it once that is empty."""
    driver = Driver(detect())
    driver.open(path).remove()
    if path.startswith(f"{DEFAULT_PARENT}/"):
        with contextlib.suppress(OSError):
            driver.prune(path.rpartition("/")[0])
