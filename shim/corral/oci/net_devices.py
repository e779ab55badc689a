"""linux.netDevices: network devices of the host that the container gets, with their addresses.

The host's part moves them; init's gives them their addresses back and brings them up. Once moved they share the fate of
the network namespace: with it a virtual one ends, and a physical one goes back to the host.

    init -> parent   {"devices": [NAME, …]}                          those asked for that are there already
    parent -> init   [[NAME, [[FAMILY, PREFIX, FLAGS, [[KIND, HEX], …]], …]], …]     those that were moved, in order

Source: runtime-spec config-linux.md "Network Devices".
"""

import os
import re
from collections.abc import Mapping, Sequence

from corral.kernel import network_devices
from corral.kernel.network_devices import Address
from corral.oci.channel import ChildEnd
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.spec import NetDevice

type _Moved = list[tuple[str, list[tuple[int, int, int, list[tuple[int, str]]]]]]


def names_inside(devices: Mapping[str, NetDevice]) -> tuple[str, ...]:
    """What devices are to be called."""
    return tuple(inside.name or device for device, inside in devices.items())


def move_devices(devices: Mapping[str, NetDevice], pid: int, present: object) -> _Moved:
    """Move devices into the network namespace of init, process pid, which has those of the names present.

    Raises ExecFailed; none has been moved then whose absence, or whose name, was known to be wrong.
    """
    taken = set(present) if isinstance(present, list) else set()
    found = []
    for device, name in zip(devices, names_inside(devices), strict=True):
        try:
            index = network_devices.index_of(device)
        except OSError as e:
            raise ExecFailed(SETUP, f"linux.netDevices.{device}: the host has no such network device") from e
        if name in taken:
            raise ExecFailed(SETUP, f"linux.netDevices.{device}: the container has a device {name!r} already")
        found.append((device, index, name))
    moved: _Moved = []
    for device, index, name in found:
        addresses = [_to_json(address) for address in network_devices.addresses_of(index)]
        try:
            network_devices.move(index, pid=pid, name=name)
        except OSError as e:
            raise ExecFailed(SETUP, f"linux.netDevices.{device}: it can't be moved: {os.strerror(e.errno or 0)}") from e
        moved.append((name, addresses))
    return moved


def take_devices(channel: ChildEnd, wanted: Sequence[str]) -> None:
    """Have devices moved into the caller's network namespace, by the names wanted, and put them to work."""
    before = network_devices.names()
    channel.send("devices", sorted(set(wanted) & set(before.values())))
    moved = channel.receive_answer()
    if not isinstance(moved, list):
        os._exit(1)
    new = {name: index for index, name in network_devices.names().items() if index not in before}
    for name, addresses in moved:
        index = new.pop(_called(name, new), None)
        if index is None:
            raise ExecFailed(SETUP, f"the network device {name} was moved, but did not arrive")
        for address in addresses:
            network_devices.add_address(index, _from_json(address))
        network_devices.bring_up(index)


def _called(name: str, new: Mapping[str, int]) -> str:
    """What the kernel made of a name: for %d, the lowest number that was free."""
    if "%d" not in name:
        return name
    pattern = re.compile(re.escape(name).replace("%d", "([0-9]+)"))
    numbers = [(int(found[1]), each) for each in new if (found := pattern.fullmatch(each))]
    return min(numbers, default=(0, name))[1]


def _to_json(address: Address) -> tuple[int, int, int, list[tuple[int, str]]]:
    attributes = [(kind, value.hex()) for kind, value in address.attributes]
    return address.family, address.prefix, address.flags, attributes


def _from_json(value: tuple[int, int, int, list[tuple[int, str]]]) -> Address:
    family, prefix, flags, attributes = value
    return Address(family, prefix, flags, tuple((kind, bytes.fromhex(each)) for kind, each in attributes))
