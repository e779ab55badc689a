"""linux.resources of config.json as the limits of a cgroup. Pure.

Zero is Go's "not set" for every number here but one, so it is no limit but none of our business; -1 is no limit.
"""

from collections.abc import Iterable

from corral.kernel import cgroup
from corral.oci.resources import BlockIO, Cpu, Memory, Network, Pids, ThrottleDevice
from corral.oci.spec import DeviceRule, DeviceType, Resources

_TYPES = {DeviceType.ALL: "a", DeviceType.BLOCK: "b", DeviceType.CHAR: "c", DeviceType.UNBUFFERED: "c"}


def limits_of(resources: Resources | None) -> cgroup.Resources:
    """All limits of a new container: those asked for, and which devices it may use.

    Raises ValueError that begins with the JSON path.
    """
    wanted = resources or Resources()
    return _limits(wanted, _devices(wanted.devices))


def changes_of(resources: Resources) -> cgroup.Resources:
    """What an update of a running container asks for; its devices stay as they are unless it names some."""
    return _limits(resources, _devices(resources.devices) if resources.devices else None)


def _limits(wanted: Resources, devices: tuple[cgroup.DeviceRule, ...] | None) -> cgroup.Resources:
    return cgroup.Resources(
        cpu=_cpu(wanted.cpu or Cpu()),
        memory=_memory(wanted.memory or Memory()),
        pids=cgroup.PidsLimits(_pids(wanted.pids)),
        io=_io(wanted.block_io or BlockIO()),
        hugetlb=tuple(cgroup.HugetlbLimit(each.page_size, each.limit) for each in wanted.hugepage_limits),
        network=_network(wanted.network or Network()),
        rdma=tuple(
            cgroup.RdmaLimit(device, limit.hca_handles, limit.hca_objects) for device, limit in wanted.rdma.items()
        ),
        devices=devices,
        unified=wanted.unified,
    )


def _pids(pids: Pids | None) -> int | None:
    """No processes but init: 0 and 1 are the same, and systemd knows only 1. Source: runtime-spec 1.3; runc 1.4."""
    return None if pids is None or pids.limit is None else pids.limit or 1


def _cpu(cpu: Cpu) -> cgroup.CpuLimits:
    return cgroup.CpuLimits(
        shares=cpu.shares or None,
        quota_us=cpu.quota or None,
        period_us=cpu.period or None,
        burst_us=cpu.burst,
        idle=cpu.idle,
        cpus=cpu.cpus or None,
        mems=cpu.mems or None,
        realtime_runtime_us=cpu.realtime_runtime or None,
        realtime_period_us=cpu.realtime_period or None,
    )


def _memory(memory: Memory) -> cgroup.MemoryLimits:
    return cgroup.MemoryLimits(
        limit_bytes=memory.limit or None,
        reservation_bytes=memory.reservation or None,
        swap_bytes=memory.swap or None,
        swappiness=memory.swappiness,
        disable_oom_killer=memory.disable_oom_killer or None,
        check_before_update=memory.check_before_update and bool(memory.limit),
    )


def _io(io: BlockIO) -> cgroup.IoLimits:
    devices: dict[tuple[int, int], dict[str, int]] = {}
    for weighted in io.weight_device:
        if weighted.weight:
            devices.setdefault((weighted.major, weighted.minor), {})["weight"] = weighted.weight
    _throttle(devices, "read_bytes_per_s", io.throttle_read_bps_device)
    _throttle(devices, "write_bytes_per_s", io.throttle_write_bps_device)
    _throttle(devices, "read_ops_per_s", io.throttle_read_iops_device)
    _throttle(devices, "write_ops_per_s", io.throttle_write_iops_device)
    limits = tuple(cgroup.IoDeviceLimits(major, minor, **rates) for (major, minor), rates in devices.items())
    return cgroup.IoLimits(weight=io.weight or None, devices=limits)


def _network(network: Network) -> cgroup.NetworkMarks:
    return cgroup.NetworkMarks(
        network.class_id or None, tuple((each.name, each.priority) for each in network.priorities)
    )


def _throttle(devices: dict[tuple[int, int], dict[str, int]], what: str, throttled: Iterable[ThrottleDevice]) -> None:
    for device in throttled:
        devices.setdefault((device.major, device.minor), {})[what] = device.rate


def _devices(rules: Iterable[DeviceRule]) -> tuple[cgroup.DeviceRule, ...]:
    """Nothing but what the rules allow and what every container may use, which no rule takes away.

    Source: OCI config-linux.md "Default Devices"; runc appends the same to what config.json says.
    """
    deny_all, *always = cgroup.DEFAULT_RULES
    return (deny_all, *(_rule(rule, i) for i, rule in enumerate(rules)), *always)


def _rule(rule: DeviceRule, position: int) -> cgroup.DeviceRule:
    kind = _TYPES.get(rule.type)
    if kind is None:
        raise ValueError(f"linux.resources.devices[{position}].type: {rule.type.value!r} is not a, b or c")
    # Also `rwa`: an `a` beside others says nothing, as with runc.
    return cgroup.DeviceRule(
        rule.allow, kind, rule.major, rule.minor, rule.access.replace("a", "") or rule.access or "rwm"
    )
