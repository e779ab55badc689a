"""Limits on the wire and in the kernel's terms, and what remains after an update."""

from corral.api.types.v1 import types_pb2
from corral.cgroups import wire
from corral.kernel import cgroup
from corral.rpc.limits import after_change


def test_a_field_that_is_absent_changes_nothing() -> None:
    assert wire.resources(types_pb2.Resources()) == cgroup.Resources()


def test_a_zero_that_is_given_is_a_value() -> None:
    message = types_pb2.Resources(
        cpu=types_pb2.CpuResources(burst_us=0, idle=0),
        memory=types_pb2.MemoryResources(limit_bytes=-1, swappiness=0, oom_group=False),
    )
    found = wire.resources(message)
    assert found.cpu == cgroup.CpuLimits(burst_us=0, idle=0)
    assert found.memory == cgroup.MemoryLimits(limit_bytes=-1, swappiness=0, oom_group=False)


def test_lists_and_maps_are_taken_over() -> None:
    message = types_pb2.Resources(
        io=types_pb2.IoResources(weight=10, devices=[types_pb2.IoDeviceLimit(major=8, minor=0, read_bytes_per_s=5)]),
        hugetlb=[types_pb2.HugetlbLimit(page_size="2MB", limit_bytes=0)],
        devices=[types_pb2.DeviceRule(allow=True, type="c", major=1, access="r"), types_pb2.DeviceRule(allow=False)],
        rdma={"mlx": types_pb2.RdmaLimit(hca_handles=2)},
        unified={"memory.high": "1"},
    )
    found = wire.resources(message)
    assert found.io == cgroup.IoLimits(10, (cgroup.IoDeviceLimits(8, 0, read_bytes_per_s=5),))
    assert found.hugetlb == (cgroup.HugetlbLimit("2MB", 0),)
    assert found.devices == (cgroup.DeviceRule(True, "c", 1, None, "r"), cgroup.DeviceRule(False))
    assert found.rdma == (cgroup.RdmaLimit("mlx", hca_handles=2),)
    assert found.unified == {"memory.high": "1"}


def test_an_update_replaces_what_it_names_and_keeps_the_rest() -> None:
    now = types_pb2.Resources(
        cpu=types_pb2.CpuResources(shares=512, quota_us=1000),
        pids=types_pb2.PidsResources(limit=5),
        io=types_pb2.IoResources(
            devices=[
                types_pb2.IoDeviceLimit(major=8, minor=0, read_bytes_per_s=1),
                types_pb2.IoDeviceLimit(major=9, minor=0),
            ]
        ),
        hugetlb=[types_pb2.HugetlbLimit(page_size="2MB", limit_bytes=1)],
        devices=[types_pb2.DeviceRule(allow=False)],
        unified={"a.b": "1", "c.d": "2"},
    )
    change = types_pb2.Resources(
        cpu=types_pb2.CpuResources(quota_us=-1),
        io=types_pb2.IoResources(devices=[types_pb2.IoDeviceLimit(major=8, minor=0, read_bytes_per_s=7)]),
        hugetlb=[types_pb2.HugetlbLimit(page_size="2MB", limit_bytes=9)],
        devices=[types_pb2.DeviceRule(allow=True)],
        unified={"c.d": "3"},
    )
    merged = after_change(now, change)
    assert (merged.cpu.shares, merged.cpu.quota_us, merged.pids.limit) == (512, -1, 5)
    assert [(each.major, each.read_bytes_per_s) for each in merged.io.devices] == [(8, 7), (9, 0)]
    assert [each.limit_bytes for each in merged.hugetlb] == [9]
    assert [each.allow for each in merged.devices] == [True]
    assert dict(merged.unified) == {"a.b": "1", "c.d": "3"}
    assert now.cpu.quota_us == 1000


def test_changes_of_one_device_one_after_the_other_add_up_and_a_list_of_triggers_is_replaced() -> None:
    def io(**rates: int) -> types_pb2.Resources:
        devices = [types_pb2.IoDeviceLimit(major=8, minor=0, **rates)]
        return types_pb2.Resources(io=types_pb2.IoResources(devices=devices))

    def rdma(**limits: int) -> types_pb2.Resources:
        return types_pb2.Resources(rdma={"mlx": types_pb2.RdmaLimit(**limits)})

    def pressure(*resources: str) -> types_pb2.Resources:
        triggers = [types_pb2.PressureTrigger(resource=each) for each in resources]
        return types_pb2.Resources(pressure=types_pb2.PressureTriggers(triggers=triggers))

    both = after_change(io(read_bytes_per_s=1), io(write_bytes_per_s=2))
    assert both == io(read_bytes_per_s=1, write_bytes_per_s=2)
    assert after_change(both, io(read_bytes_per_s=1)) == both
    assert after_change(rdma(hca_handles=1), rdma(hca_objects=2)) == rdma(hca_handles=1, hca_objects=2)
    assert after_change(pressure("cpu", "io"), pressure("memory")) == pressure("memory")
    assert after_change(pressure("cpu"), pressure()) == pressure()
    assert after_change(pressure("cpu"), types_pb2.Resources()) == pressure("cpu")


def test_no_limit_is_zero_in_a_reading() -> None:
    message = wire.stats("web", cgroup.Stats(memory=cgroup.MemoryStats(), pids=cgroup.PidsStats(3)))
    assert (message.id, message.memory.limit_bytes, message.pids.current, message.pids.limit) == ("web", 0, 3, 0)
    assert not message.HasField("cpu")
    assert not message.memory.HasField("pressure")
