"""What a specification says about namespaces, looked at before anything is made. Pure.

Everything raises ValueError that begins with the JSON path of what is wrong.
Source: runtime-spec config-linux.md, user_namespaces(7), time_namespaces(7).
"""

import os
from collections.abc import Sequence
from itertools import pairwise

from corral.kernel.namespaces import Kind
from corral.kernel.time_namespaces import CLOCKS
from corral.oci.spec import IdMapping, Linux, Namespace, Spec

_IDS = 2**32 - 1
_MOST_RANGES = 340
_LONGEST_DEVICE_NAME = 15


def check_confinement(spec: Spec) -> None:
    """User and time namespaces and network devices."""
    linux = spec.linux
    kinds = {namespace.type: namespace for namespace in linux.namespaces}
    if (user := kinds.get(Kind.USER)) is not None:
        _check_user_namespace(spec, user)
    elif linux.uid_mappings or linux.gid_mappings:
        name = "uidMappings" if linux.uid_mappings else "gidMappings"
        raise ValueError(f"linux.{name}: the container has no user namespace")
    if linux.time_offsets:
        _check_time_offsets(linux, kinds.get(Kind.TIME))
    if linux.net_devices:
        _check_devices(linux, kinds.get(Kind.NETWORK))


def _check_user_namespace(spec: Spec, namespace: Namespace) -> None:
    linux = spec.linux
    for name, mappings in (("uidMappings", linux.uid_mappings), ("gidMappings", linux.gid_mappings)):
        if not mappings and not namespace.path:
            raise ValueError(f"linux.{name}: missing: a new user namespace takes both")
        check_ranges(mappings, f"linux.{name}")
        if mappings and not _holds(mappings, 0):
            raise ValueError(f"linux.{name}: maps no id to 0, which sets the container up")
    if linux.uid_mappings and linux.gid_mappings:
        _check_ids(spec)


def _check_ids(spec: Spec) -> None:
    """Ids that are used have to be mapped."""
    uids, gids = spec.linux.uid_mappings, spec.linux.gid_mappings
    used: list[tuple[str, int, Sequence[IdMapping]]] = []
    if spec.process is not None:
        user = spec.process.user
        used += [("process.user.uid", user.uid, uids), ("process.user.gid", user.gid, gids)]
        used += [(f"process.user.additionalGids[{i}]", gid, gids) for i, gid in enumerate(user.additional_gids)]
    for i, mount in enumerate(spec.mounts):
        for option in mount.options:
            name, _, value = option.partition("=")
            if name in ("uid", "gid") and value.isascii() and value.isdigit():
                used.append((f"mounts[{i}].options: {option}", int(value), uids if name == "uid" else gids))
    for path, number, mappings in used:
        if not _holds(mappings, number):
            raise ValueError(f"{path}: {number} is not mapped in the user namespace")


def _holds(mappings: Sequence[IdMapping], number: int) -> bool:
    return any(each.container_id <= number < each.container_id + each.size for each in mappings)


def check_ranges(mappings: Sequence[IdMapping], path: str) -> None:
    """Ranges of ids that the kernel takes."""
    if len(mappings) > _MOST_RANGES:
        raise ValueError(f"{path}: the kernel takes at most {_MOST_RANGES} ranges")
    for i, each in enumerate(mappings):
        if not each.size:
            raise ValueError(f"{path}[{i}].size: must not be 0")
        for name, first in (("containerID", each.container_id), ("hostID", each.host_id)):
            if first + each.size > _IDS:
                raise ValueError(f"{path}[{i}].{name}: {first} and the {each.size - 1} ids after it pass the last id")
    for name in ("container_id", "host_id"):
        ordered = sorted((getattr(each, name), each.size, i) for i, each in enumerate(mappings))
        for (first, size, _), (following, _, i) in pairwise(ordered):
            if following < first + size:
                raise ValueError(f"{path}[{i}].{name.replace('_id', 'ID')}: {following} is mapped twice")


def _check_time_offsets(linux: Linux, namespace: Namespace | None) -> None:
    if namespace is None or namespace.path:
        raise ValueError("linux.timeOffsets: the container has no new time namespace")
    for clock in linux.time_offsets:
        if clock not in CLOCKS:
            raise ValueError(f"linux.timeOffsets.{clock}: there is no such clock, only {' and '.join(CLOCKS)}")


def _check_devices(linux: Linux, namespace: Namespace | None) -> None:
    if namespace is None:
        raise ValueError("linux.netDevices: the container shares the host's network namespace")
    names: set[str] = set()
    for device, inside in linux.net_devices.items():
        if not _is_device_name(device) or "%" in device:
            raise ValueError(f"linux.netDevices.{device}: not the name of a network device")
        if inside.name and not _is_device_name(inside.name):
            raise ValueError(f"linux.netDevices.{device}.name: {inside.name!r} is not the name of a network device")
        name = inside.name or device
        if name in names and "%" not in name:
            raise ValueError(f"linux.netDevices.{device}.name: {name!r} is given twice")
        names.add(name)


def _is_device_name(name: str) -> bool:
    """As the kernel's dev_valid_name(); %d, once, stands for a number that it picks."""
    rest = name.replace("%d", "", 1)
    return (
        0 < len(os.fsencode(name)) <= _LONGEST_DEVICE_NAME
        and name not in (".", "..")
        and not any(c in "/:%" or c.isspace() for c in rest)
    )
