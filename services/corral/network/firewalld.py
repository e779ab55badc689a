"""Our bridges in firewalld's zone of what is trusted, where firewalld runs: it rejects what no zone of its accepts.

Asked for on D-Bus, for as long as firewalld itself remembers: a reload forgets it, and is noticed. A bridge that an
admin has put into a zone stays there. Published ports need nothing: firewalld accepts what was led to a container,
unless its StrictForwardPorts says otherwise, which is the admin's word.

Source: firewalld.dbus(5), "org.fedoraproject.FirewallD1.zone"; firewalld.zones(5).
"""

import os
from collections.abc import Collection

from corral.kernel.dbus.connection import CallFailed, Connection, Target

FAMILY, TABLE, CHAIN = "inet", "firewalld", "filter_FORWARD"
ZONE = "trusted"
# The netlink thread waits for it.
TIMEOUT_S = 5.0
_BUS = "unix:path=/run/dbus/system_bus_socket"
_SERVICE = "org.fedoraproject.FirewallD1"
_NOW = Target(_SERVICE, "/org/fedoraproject/FirewallD1", f"{_SERVICE}.zone")
_LASTING = Target(_SERVICE, "/org/fedoraproject/FirewallD1/config", f"{_SERVICE}.config")


def follow(bridges: Collection[str], gone: Collection[str]) -> bool:
    """Have these be trusted, and those no more; returns whether anything had to be changed. Raises OSError."""
    address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _BUS
    with Connection.to_bus(address, timeout_s=TIMEOUT_S) as bus:
        added = [_trust(bus, bridge) for bridge in bridges]
        removed = [_forget(bus, bridge) for bridge in gone]
    return any(added + removed)


def _trust(bus: Connection, bridge: str) -> bool:
    if _zone(bus, _NOW, "getZoneOfInterface", bridge):
        return False
    return _change(bus, "addInterface", bridge)


def _forget(bus: Connection, bridge: str) -> bool:
    if _zone(bus, _NOW, "getZoneOfInterface", bridge) != ZONE or _zone(bus, _LASTING, "getZoneOfInterface", bridge):
        return False
    return _change(bus, "removeInterface", bridge)


def _zone(bus: Connection, target: Target, method: str, bridge: str) -> str:
    (zone,) = bus.call(target, method, "s", bridge)
    return str(zone)


def _change(bus: Connection, method: str, bridge: str) -> bool:
    try:
        bus.call(_NOW, method, "ss", ZONE, bridge)
    except CallFailed as e:
        if "ZONE_ALREADY_SET" in str(e) or "UNKNOWN_INTERFACE" in str(e):  # somebody was faster
            return False
        raise
    return True
