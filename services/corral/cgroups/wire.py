"""Wire types to and from those of corral.kernel.cgroup. Pure."""

from google.protobuf.message import Message

from corral.api.cgroups.v1 import cgroups_pb2
from corral.api.types.v1 import types_pb2
from corral.kernel import cgroup

LAYOUTS = {
    cgroup.Kind.V1: cgroups_pb2.HostResponse.LAYOUT_V1,
    cgroup.Kind.V2: cgroups_pb2.HostResponse.LAYOUT_V2,
    cgroup.Kind.HYBRID: cgroups_pb2.HostResponse.LAYOUT_HYBRID,
}


def _given[T](message: Message, field: str, value: T) -> T | None:
    return value if message.HasField(field) else None


def resources(message: types_pb2.Resources) -> cgroup.Resources:
    """The limits that a message sets; without device rules these stay as they are."""
    return cgroup.Resources(
        cpu=_cpu(message.cpu),
        memory=_memory(message.memory),
        pids=cgroup.PidsLimits(_given(message.pids, "limit", message.pids.limit)),
        io=cgroup.IoLimits(
            _given(message.io, "weight", message.io.weight), tuple(_io_device(each) for each in message.io.devices)
        ),
        hugetlb=tuple(cgroup.HugetlbLimit(each.page_size, each.limit_bytes) for each in message.hugetlb),
        rdma=tuple(_rdma(device, limit) for device, limit in message.rdma.items()),
        devices=tuple(_device_rule(each) for each in message.devices) or None,
        unified=dict(message.unified),
    )


def _cpu(message: types_pb2.CpuResources) -> cgroup.CpuLimits:
    return cgroup.CpuLimits(
        shares=_given(message, "shares", message.shares),
        quota_us=_given(message, "quota_us", message.quota_us),
        period_us=_given(message, "period_us", message.period_us),
        burst_us=_given(message, "burst_us", message.burst_us),
        idle=_given(message, "idle", message.idle),
        cpus=message.cpus or None,
        mems=message.mems or None,
        realtime_runtime_us=_given(message, "realtime_runtime_us", message.realtime_runtime_us),
        realtime_period_us=_given(message, "realtime_period_us", message.realtime_period_us),
    )


def _memory(message: types_pb2.MemoryResources) -> cgroup.MemoryLimits:
    return cgroup.MemoryLimits(
        limit_bytes=_given(message, "limit_bytes", message.limit_bytes),
        reservation_bytes=_given(message, "reservation_bytes", message.reservation_bytes),
        swap_bytes=_given(message, "swap_bytes", message.swap_bytes),
        swappiness=_given(message, "swappiness", message.swappiness),
        disable_oom_killer=_given(message, "disable_oom_killer", message.disable_oom_killer),
        high_bytes=_given(message, "high_bytes", message.high_bytes),
        min_bytes=_given(message, "min_bytes", message.min_bytes),
        oom_group=_given(message, "oom_group", message.oom_group),
    )


def _io_device(message: types_pb2.IoDeviceLimit) -> cgroup.IoDeviceLimits:
    return cgroup.IoDeviceLimits(
        message.major,
        message.minor,
        weight=_given(message, "weight", message.weight),
        read_bytes_per_s=_given(message, "read_bytes_per_s", message.read_bytes_per_s),
        write_bytes_per_s=_given(message, "write_bytes_per_s", message.write_bytes_per_s),
        read_ops_per_s=_given(message, "read_ops_per_s", message.read_ops_per_s),
        write_ops_per_s=_given(message, "write_ops_per_s", message.write_ops_per_s),
    )


def _rdma(device: str, message: types_pb2.RdmaLimit) -> cgroup.RdmaLimit:
    return cgroup.RdmaLimit(
        device,
        _given(message, "hca_handles", message.hca_handles),
        _given(message, "hca_objects", message.hca_objects),
    )


def _device_rule(message: types_pb2.DeviceRule) -> cgroup.DeviceRule:
    return cgroup.DeviceRule(
        message.allow,
        message.type or "a",
        _given(message, "major", message.major),
        _given(message, "minor", message.minor),
        message.access or "rwm",
    )


def stats(name: str, reading: cgroup.Stats) -> cgroups_pb2.Stats:
    """One reading as a message, which has no time yet. No limit is 0 there."""
    message = cgroups_pb2.Stats(id=name)
    if reading.cpu is not None:
        _fill_cpu(message.cpu, reading.cpu)
    if reading.memory is not None:
        _fill_memory(message.memory, reading.memory)
    if reading.pids is not None:
        message.pids.current = reading.pids.current
        message.pids.limit = max(0, reading.pids.limit)
    for io in reading.io:
        message.io.add(
            major=io.major,
            minor=io.minor,
            read_bytes=io.read_bytes,
            write_bytes=io.write_bytes,
            read_ops=io.read_ops,
            write_ops=io.write_ops,
        )
    for pages in reading.hugetlb:
        message.hugetlb.add(
            page_size=pages.page_size,
            usage_bytes=pages.usage_bytes,
            max_bytes=pages.max_bytes,
            failures=pages.failures,
        )
    if reading.io_pressure is not None:
        message.io_pressure.CopyFrom(_pressure(reading.io_pressure))
    return message


def _fill_cpu(message: cgroups_pb2.CpuStats, cpu: cgroup.CpuStats) -> None:
    message.usage_ns = cpu.usage_ns
    message.user_ns = cpu.user_ns
    message.system_ns = cpu.system_ns
    message.periods = cpu.periods
    message.throttled_periods = cpu.throttled_periods
    message.throttled_ns = cpu.throttled_ns
    if cpu.pressure is not None:
        message.pressure.CopyFrom(_pressure(cpu.pressure))


def _fill_memory(message: cgroups_pb2.MemoryStats, memory: cgroup.MemoryStats) -> None:
    message.usage_bytes = memory.usage_bytes
    message.working_set_bytes = memory.working_set_bytes
    message.limit_bytes = max(0, memory.limit_bytes)
    message.peak_bytes = memory.peak_bytes
    message.swap_bytes = memory.swap_bytes
    message.anon_bytes = memory.anon_bytes
    message.file_bytes = memory.file_bytes
    message.kernel_bytes = memory.kernel_bytes
    message.shmem_bytes = memory.shmem_bytes
    message.page_faults = memory.page_faults
    message.major_page_faults = memory.major_page_faults
    message.oom_kills = memory.oom_kills
    message.limit_hits = memory.limit_hits
    if memory.pressure is not None:
        message.pressure.CopyFrom(_pressure(memory.pressure))


def _pressure(pressure: cgroup.Pressure) -> cgroups_pb2.Pressure:
    return cgroups_pb2.Pressure(
        some_avg10=pressure.some_avg10,
        some_avg60=pressure.some_avg60,
        some_avg300=pressure.some_avg300,
        some_total_us=pressure.some_total_us,
        full_avg10=pressure.full_avg10,
        full_avg60=pressure.full_avg60,
        full_avg300=pressure.full_avg300,
        full_total_us=pressure.full_total_us,
    )


def host(layout: cgroup.Layout, driver: str) -> cgroups_pb2.HostResponse:
    """What a layout offers."""
    answer = cgroups_pb2.HostResponse(layout=LAYOUTS[layout.kind], driver=driver)
    for hierarchy in layout.hierarchies:
        for name in sorted(hierarchy.controllers):
            answer.controllers.add(name=name, version=hierarchy.version, mountpoint=hierarchy.mount_point)
    return answer
