"""The drivers macvlan and ipvlan: endpoints share a link of the host, their parent, and the network that it is in.

    -o parent=eth0       a link that is there, and stays; another network cannot have it too
    -o parent=eth0.10    made as VLAN 10 of eth0 where it is not there, and removed with the network
    no parent            one end of a cable that leads nowhere: its containers reach one another only

Containers are hosts of the parent's network, beside this one: no port of the host is published, nothing masqueraded,
nothing filtered here, and the host itself does not reach them. Names are those that their name servers know.

Source: docs.docker.com, "Macvlan network driver", "IPvlan network driver"; kernel ipvlan.rst.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from corral.network import network_options as options
from corral.network import subnets
from corral.network.links import SubLink, link_exists
from corral.network.model import Network, NetworkSpec
from corral.network.ownership import owner
from corral.rpc.errors import FailedPrecondition, InvalidArgument
from corral.store import failpoint

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

MACVLAN, IPVLAN = "macvlan", "ipvlan"
_PEER_PREFIX = "crp"  # where ours has "crl": of the other end of a cable


def sublink(network: Network) -> SubLink:
    """The kind of link that endpoints of a network have. Raises InvalidArgument."""
    if network.driver == MACVLAN:
        return SubLink(MACVLAN, options.chosen(network.options, options.MACVLAN_MODE, options.MACVLAN_MODES, "bridge"))
    mode = options.chosen(network.options, options.IPVLAN_MODE, options.IPVLAN_MODES, "l2")
    flag = options.chosen(network.options, options.IPVLAN_FLAG, options.IPVLAN_FLAGS, "bridge")
    return SubLink(IPVLAN, mode, flag)


def has_own_mac(network: Network) -> bool:
    """Whether an endpoint has a hardware address of its own in it, and not its parent's."""
    return network.driver != IPVLAN and network.options.get(options.MACVLAN_MODE) != "passthru"


def routes_by_link(network: Network) -> bool:
    """Whether it has no gateway to ask for the way: in layer 3 the parent's host knows it."""
    return network.driver == IPVLAN and network.options.get(options.IPVLAN_MODE, "") in ("l3", "l3s")


_KNOWN = {
    MACVLAN: (options.PARENT, options.MACVLAN_MODE, options.MTU),
    IPVLAN: (options.PARENT, options.IPVLAN_MODE, options.IPVLAN_FLAG, options.MTU),
}


@dataclass(frozen=True, slots=True)
class SubLinkDriver:
    """See the module."""

    name: str

    def check(self, spec: NetworkSpec) -> NetworkSpec:
        options.refuse_unknown(spec, *_KNOWN[self.name])
        parent = spec.options.get(options.PARENT, "")
        if parent:
            subnets.check_interface_name(parent)
        if spec.interface:
            raise InvalidArgument(
                f"a network of driver {self.name} has no bridge to be named: name its parent with -o parent=LINK",
                reason="BAD_OPTION",
            )
        sublink(Network("", "", spec.name, self.name, options=spec.options))
        vlan = options.vlan(parent, link_exists)
        return replace(options.with_mtu(spec), interface=parent if vlan else "")

    def prove(self, netlink: "Netlink", network: Network) -> None:
        """By making such a link, and deleting it."""
        made = not link_exists(network.lower)
        try:
            self._ensure_lower(netlink, network)
            self._try(netlink, network)
        except BaseException:
            if made:
                self.remove(netlink, network)
            raise

    def _try(self, netlink: "Netlink", network: Network) -> None:
        try:
            netlink.try_sublink(sublink(network), network.lower)
        except OSError as e:
            raise _refusal(network, e) from e

    def build(self, netlink: "Netlink", network: Network, others: Sequence[Network]) -> bool:
        self._ensure_lower(netlink, network)
        failpoint("network.build.after_bridge")
        return False

    def _ensure_lower(self, netlink: "Netlink", network: Network) -> None:
        if network.lower == network.bridge and not network.options.get(options.PARENT):
            netlink.ensure_cable(network.bridge, f"{_PEER_PREFIX}{network.bridge[len(_PEER_PREFIX) :]}")
            return
        vlan = options.vlan(network.lower, link_exists)
        if vlan is not None and network.lower == network.bridge:
            self._make_vlan(netlink, network, vlan)
        if not link_exists(network.lower):
            raise FailedPrecondition(
                f"network {network.name!r} needs the link {network.lower} of this host, which is not there: make it, or"
                " name another with -o parent=LINK",
                reason="NO_PARENT",
            )

    def _make_vlan(self, netlink: "Netlink", network: Network, vlan: options.Vlan) -> None:
        try:
            netlink.make_vlan(network.lower, owner(network), vlan.parent, vlan.tag)
        except OSError as e:
            if e.errno == errno.ENODEV:
                why = f"there is no link {vlan.parent} on this host"
            elif e.errno == errno.EOPNOTSUPP:
                why = "this kernel has no VLANs (802.1Q): load them with `modprobe 8021q`"
            else:
                why = str(e)
            raise FailedPrecondition(f"parent {network.lower} cannot be made: {why}", reason="NO_PARENT") from e

    def remove(self, netlink: "Netlink", network: Network) -> None:
        if network.lower == network.bridge:
            netlink.delete_own(network.bridge, owner(network))
        failpoint("network.remove.after_bridge")


def _refusal(network: Network, e: OSError) -> FailedPrecondition:
    if e.errno == errno.EOPNOTSUPP:
        why = f"this kernel has no {network.driver}: load it with `modprobe {network.driver}`, or use another driver"
    elif e.errno == errno.EBUSY:
        why = f"{network.lower} is in use otherwise, by a bridge or by a link of another kind"
    else:
        why = f"{network.lower} does not carry {network.driver} links ({e})"
    return FailedPrecondition(f"network {network.name!r} cannot be: {why}", reason="NO_DRIVER")
