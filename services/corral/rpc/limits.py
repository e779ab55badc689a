"""What limits hold after some of them were changed. Pure: the leaf that sets them and whoever remembers them agree."""

from corral.api.types.v1 import types_pb2


def after_change(now: types_pb2.Resources, change: types_pb2.Resources) -> types_pb2.Resources:
    """Values replace values, also those of one device or page size; access rules and triggers are whole lists."""
    found = types_pb2.Resources()
    found.CopyFrom(now)
    if change.devices:
        del found.devices[:]
    if change.HasField("pressure"):
        found.ClearField("pressure")
    found.MergeFrom(change)
    if found.HasField("io"):
        _unite_devices(found.io)
    sizes = {each.page_size: each.limit_bytes for each in found.hugetlb}
    del found.hugetlb[:]
    for size, limit in sizes.items():
        found.hugetlb.add(page_size=size, limit_bytes=limit)
    for device in change.rdma:  # of a map the whole value was replaced
        found.rdma[device].CopyFrom(now.rdma[device] if device in now.rdma else types_pb2.RdmaLimit())
        found.rdma[device].MergeFrom(change.rdma[device])
    return found


def with_shares_again(now: types_pb2.Resources, change: types_pb2.Resources) -> types_pb2.Resources:
    """What to set for a change: the shares that hold, too, if it ends idling, as the kernel has forgotten them."""
    cpu = change.cpu
    if cpu.idle or not cpu.HasField("idle") or cpu.HasField("shares") or not now.cpu.HasField("shares"):
        return change
    found = types_pb2.Resources()
    found.CopyFrom(change)
    found.cpu.shares = now.cpu.shares
    return found


def _unite_devices(io: types_pb2.IoResources) -> None:
    devices: dict[tuple[int, int], types_pb2.IoDeviceLimit] = {}
    for each in io.devices:
        known = devices.setdefault((each.major, each.minor), types_pb2.IoDeviceLimit())
        known.MergeFrom(each)
    del io.devices[:]
    io.devices.extend(devices.values())
