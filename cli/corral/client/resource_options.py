"""The limits of a container, from the words people use: "64m", 1.5 CPUs, "/dev/sda:10m"."""

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from corral.api.types.v1 import types_pb2
from corral.client.quantities import duration_s, size_bytes

_CPU_PERIOD_US = 100_000


class ResourceOptions(TypedDict, total=False):
    """What a container may use, at most. Devices are paths of this host, or "major:minor"."""

    memory: int | str  # bytes, or "64m"
    memory_swap: int | str  # memory plus swap; "-1" no bound
    memory_reservation: int | str
    memory_high: int | str  # cgroup v2 only, as the next two are
    memory_min: int | str
    oom_group: bool  # an OOM kills all of its processes
    memory_swappiness: int  # 0 to 100, cgroup v1 only
    oom_kill_disable: bool  # cgroup v1 only
    cpus: float
    cpu_period: int  # microseconds
    cpu_quota: int
    cpu_burst: int
    cpu_idle: bool  # it runs when nobody else wants to
    cpu_rt_period: int  # microseconds
    cpu_rt_runtime: int  # of real-time CPU time in each period, cgroup v1 only
    cpu_shares: int
    cpuset_cpus: str
    cpuset_mems: str
    pids_limit: int  # 0 or -1 for none
    blkio_weight: int  # 10 to 1000
    blkio_weight_devices: Sequence[str]  # "/dev/sda:200"
    device_read_bps: Sequence[str]  # "/dev/sda:10m", bytes per second
    device_write_bps: Sequence[str]
    device_read_iops: Sequence[str]  # "/dev/sda:100"
    device_write_iops: Sequence[str]
    hugetlb: Sequence[str]  # "2MB=64m"
    rdma: Sequence[str]  # "mlx5_0=hca_handle=2,hca_object=100"
    cgroup_conf: Mapping[str, str]  # raw keys of cgroup v2, {"memory.high": "64M"}
    pressure: Sequence[str]  # events, "memory:some:150ms/2s"; "none" for none any more


def resources(o: ResourceOptions) -> types_pb2.Resources | None:
    """The message for these options; None where they ask for nothing. Raises ValueError."""
    found = types_pb2.Resources()
    _memory(found.memory, o)
    _cpu(found.cpu, o)
    if (limit := o.get("pids_limit")) is not None:
        found.pids.limit = limit or -1
    _io(found.io, o)
    found.unified.update(o.get("cgroup_conf", {}))
    found.hugetlb.extend(_hugetlb(text) for text in o.get("hugetlb", ()))
    for text in o.get("rdma", ()):
        device, _, limits = text.partition("=")
        found.rdma[device].CopyFrom(_rdma(text, limits))
    if texts := o.get("pressure"):
        found.pressure.SetInParent()
        found.pressure.triggers.extend(_trigger(text) for text in texts if text != "none")
    for part in ("memory", "cpu", "io"):
        if not getattr(found, part).ByteSize():
            found.ClearField(part)
    return found if found.ByteSize() else None


def _trigger(text: str) -> types_pb2.PressureTrigger:
    try:
        resource, share, times = text.split(":")
        stall, window = (round(duration_s(part) * 1_000_000) for part in times.split("/"))
        full = {"some": False, "full": True}[share]
        return types_pb2.PressureTrigger(resource=resource, full=full, stall_us=stall, window_us=window)
    except (ValueError, KeyError) as e:
        raise ValueError(f"pressure {text!r} is not understood: give memory:some:150ms/2s, or none") from e


def _hugetlb(text: str) -> types_pb2.HugetlbLimit:
    page_size, _, size = text.partition("=")
    try:
        return types_pb2.HugetlbLimit(page_size=page_size, limit_bytes=size_bytes(size))
    except ValueError as e:  # a number below 0, too
        raise ValueError(f"hugetlb {text!r} is not understood: give the size of pages and a limit, 2MB=64m") from e


def _rdma(text: str, limits: str) -> types_pb2.RdmaLimit:
    fields = {"hca_handle": "hca_handles", "hca_object": "hca_objects"}
    try:
        pairs = (part.split("=") for part in limits.split(","))
        return types_pb2.RdmaLimit(**{fields[key]: int(value) for key, value in pairs})
    except (ValueError, KeyError) as e:
        raise ValueError(f"rdma {text!r} is not understood: give DEVICE=hca_handle=2,hca_object=100") from e


_DEVICE_RULE = re.compile(r"(?P<type>[abc])\s+(?P<major>\d+|\*):(?P<minor>\d+|\*)\s+(?P<access>[rwm]{1,3})")


def device_rule(text: str) -> types_pb2.DeviceRule:
    """ "c 42:* rmw", which allows that. Raises ValueError."""
    found = _DEVICE_RULE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"device rule {text!r} is not understood: give a, b or c, numbers and access, 'c 42:* rmw'")
    numbers = {part: int(found[part]) for part in ("major", "minor") if found[part] != "*"}
    return types_pb2.DeviceRule(allow=True, type=found["type"], access=found["access"], **numbers)


def _memory(memory: types_pb2.MemoryResources, o: ResourceOptions) -> None:
    if limit := o.get("memory"):
        memory.limit_bytes = size_bytes(limit)
    if swap := o.get("memory_swap"):
        memory.swap_bytes = size_bytes(swap)
    if reservation := o.get("memory_reservation"):
        memory.reservation_bytes = size_bytes(reservation)
    if (swappiness := o.get("memory_swappiness", -1)) >= 0:
        memory.swappiness = swappiness
    if (disabled := o.get("oom_kill_disable")) is not None:
        memory.disable_oom_killer = disabled
    if high := o.get("memory_high"):
        memory.high_bytes = size_bytes(high)
    if least := o.get("memory_min"):
        memory.min_bytes = size_bytes(least)
    if (group := o.get("oom_group")) is not None:
        memory.oom_group = group


def _cpu(cpu: types_pb2.CpuResources, o: ResourceOptions) -> None:
    if cpus := o.get("cpus"):
        if cpus < 0.01:
            raise ValueError(f"cpus {cpus:g} is too little: the least is 0.01")
        if o.get("cpu_period") or o.get("cpu_quota"):
            raise ValueError("cpus says what cpu_period and cpu_quota say: give one or the other")
        cpu.period_us = _CPU_PERIOD_US
        cpu.quota_us = round(cpus * _CPU_PERIOD_US)
    if period := o.get("cpu_period"):
        cpu.period_us = period
    if quota := o.get("cpu_quota"):
        cpu.quota_us = quota
    if (burst := o.get("cpu_burst")) is not None:
        cpu.burst_us = burst
    if (idle := o.get("cpu_idle")) is not None:
        cpu.idle = int(idle)
    if period := o.get("cpu_rt_period"):
        cpu.realtime_period_us = period
    if (runtime := o.get("cpu_rt_runtime")) is not None:
        cpu.realtime_runtime_us = runtime
    if shares := o.get("cpu_shares"):
        cpu.shares = shares
    cpu.cpus, cpu.mems = o.get("cpuset_cpus", ""), o.get("cpuset_mems", "")


def _io(io: types_pb2.IoResources, o: ResourceOptions) -> None:
    if weight := o.get("blkio_weight"):
        io.weight = weight
    limits = {
        "weight": (o.get("blkio_weight_devices", ()), False),
        "read_bytes_per_s": (o.get("device_read_bps", ()), True),
        "write_bytes_per_s": (o.get("device_write_bps", ()), True),
        "read_ops_per_s": (o.get("device_read_iops", ()), False),
        "write_ops_per_s": (o.get("device_write_iops", ()), False),
    }
    devices: dict[tuple[int, int], types_pb2.IoDeviceLimit] = {}
    for field, (texts, is_size) in limits.items():
        for device, value in _by_device(texts, is_size=is_size):
            if device not in devices:
                devices[device] = io.devices.add(major=device[0], minor=device[1])
            setattr(devices[device], field, value)


def _by_device(texts: Iterable[str], *, is_size: bool) -> Iterable[tuple[tuple[int, int], int]]:
    for text in texts:
        path, _, value = text.rpartition(":")
        try:
            number = size_bytes(value) if is_size else int(value)
        except ValueError:
            number = -1
        if not path or number < 0:
            raise ValueError(f"device limit {text!r} is not understood: give DEVICE:NUMBER, such as /dev/sda:100")
        yield _device(path), number


def _device(path: str) -> tuple[int, int]:
    major, _, minor = path.partition(":")
    if major.isdecimal() and minor.isdecimal():
        return int(major), int(minor)
    try:
        status = os.stat(path)  # noqa: PTH116 - as the user wrote it
    except OSError as e:
        raise ValueError(f"device {path}: {e.strerror}") from e
    if not stat.S_ISBLK(status.st_mode):
        raise ValueError(f"{path} is no block device: only those have limits")
    return os.major(status.st_rdev), os.minor(status.st_rdev)
