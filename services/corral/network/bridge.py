"""The bridge driver: a Linux bridge per network, a veth pair per endpoint. Runs on the netlink thread."""

import errno
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from corral.network import subnets
from corral.network.firewall import Firewall, switch_on_forwarding
from corral.network.links import BridgePlan, InterfacePlan
from corral.network.model import Interface, Network
from corral.rpc.errors import FailedPrecondition
from corral.store import failpoint

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

DRIVER = "bridge"


def bridge_plan(network: Network) -> BridgePlan:
    """The bridge of a network: its gateways are the bridge's addresses."""
    gateways = [(part.gateway, part.subnet.prefixlen) for part in network.ranges]
    return BridgePlan(network.bridge, subnets.mac_of(network.ranges[0].gateway), network.mtu, gateways)


def interface_plans(interfaces: Iterable[Interface]) -> list[InterfacePlan]:
    """The veth pairs of an endpoint, in order. The first network with a way out has the default route."""
    plans = []
    routed: set[int] = set()  # IP versions that have their default route
    for interface in interfaces:
        network = interface.network
        gateways = []
        for address, part in interface.addresses:
            if not network.internal and address.version not in routed:
                routed.add(address.version)
                gateways.append(part.gateway)
        plans.append(
            InterfacePlan(
                name=interface.name,
                host_name=interface.host_name,
                bridge=network.bridge,
                mac=interface.mac,
                mtu=network.mtu,
                addresses=[(address, part.subnet.prefixlen) for address, part in interface.addresses],
                gateways=gateways,
            )
        )
    return plans


class BridgeDriver:
    """Builds and removes what networks are in the kernel."""

    def __init__(self, firewall: Firewall) -> None:
        self._firewall = firewall

    def build(self, netlink: "Netlink", network: Network, others: Sequence[Network]) -> bool:
        """Make, or mend, the bridge of a network and let it through the firewall; `others` are the networks that exist.

        Returns whether packet forwarding had to be switched on. Raises FailedPrecondition if the bridge's name is
        taken.
        """
        try:
            netlink.ensure_bridge(bridge_plan(network))
        except OSError as e:
            if e.errno != errno.EEXIST:
                raise
            raise FailedPrecondition(
                f"the host has an interface {network.bridge} that is not a bridge: choose another name",
                reason="INTERFACE_TAKEN",
            ) from e
        failpoint("network.build.after_bridge")
        self._firewall.add(network, others)
        return not network.internal and switch_on_forwarding(ipv6=network.ipv6)

    def remove(self, netlink: "Netlink", network: Network) -> None:
        """Remove the bridge and what the firewall knows of it; no error for what is gone."""
        netlink.delete_link(network.bridge)
        failpoint("network.remove.after_bridge")
        self._firewall.remove(network)
