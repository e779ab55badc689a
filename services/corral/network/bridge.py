"""The bridge driver: a Linux bridge per network, a veth pair per endpoint."""

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

from corral.network import network_options as options
from corral.network import subnets
from corral.network.firewall import Firewall, switch_on_forwarding
from corral.network.links import BridgePlan, link_exists
from corral.network.model import BRIDGE_DRIVER, Network, NetworkSpec
from corral.network.ownership import owner
from corral.rpc.errors import FailedPrecondition, InvalidArgument
from corral.store import failpoint

if TYPE_CHECKING:
    from corral.network.netlink import Netlink


def bridge_plan(network: Network) -> BridgePlan:
    """The bridge of a network: its gateways are the bridge's addresses."""
    gateways = [(part.gateway, part.subnet.prefixlen) for part in network.ranges]
    mac = subnets.mac_of(network.ranges[0].gateway)
    return BridgePlan(network.bridge, mac, network.mtu, gateways, owner(network))


class BridgeDriver:
    """See corral.network.driver."""

    name = BRIDGE_DRIVER

    def __init__(self, firewall: Firewall) -> None:
        self._firewall = firewall

    def check(self, spec: NetworkSpec) -> NetworkSpec:
        options.refuse_unknown(spec, options.BRIDGE_NAME, options.ICC, options.MASQUERADE, options.MTU)
        options.boolean(spec.options, options.ICC, default=True)
        options.boolean(spec.options, options.MASQUERADE, default=True)
        name = spec.options.get(options.BRIDGE_NAME, "")
        if name and spec.interface not in ("", name):
            raise InvalidArgument(
                f"the bridge cannot be called both {name!r} and {spec.interface!r}", reason="BAD_OPTION"
            )
        return replace(options.with_mtu(spec), interface=name or spec.interface)

    def prove(self, netlink: "Netlink", network: Network) -> None:
        """What exists under its name is not ours."""
        if link_exists(network.bridge):
            raise FailedPrecondition(
                f"the host already has an interface {network.bridge}: choose another name", reason="INTERFACE_TAKEN"
            )

    def build(self, netlink: "Netlink", network: Network) -> bool:
        """Make, or mend, the bridge of a network and let it through the firewall.

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
        self._firewall.add(network)
        return not network.internal and switch_on_forwarding(ipv6=network.ipv6)

    def stands(self, network: Network) -> bool:
        return link_exists(network.bridge)

    def remove(self, netlink: "Netlink", network: Network) -> None:
        """Remove the bridge if we made it, and what the firewall knows of it; no error for what is gone."""
        netlink.delete_own(network.bridge, owner(network))
        failpoint("network.remove.after_bridge")
        self._firewall.remove(network)
