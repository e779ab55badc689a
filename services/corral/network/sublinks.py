"""The drivers macvlan and ipvlan: endpoints share a link of the host, their parent, and the network that it is in.

    -o parent=eth0       a link that is there, and stays; another network cannot have it too
    -o parent=eth0.10    made as VLAN 10 of eth0 where it is not there, and removed with the network
    no parent            one end of a cable that leads nowhere, in a namespace that nobody is in: its containers reach
                         one another only, and the host's stack gets no frame of theirs

Containers are hosts of the parent's network, beside this one: no port of the host is published, nothing masqueraded,
nothing filtered here, and the host itself does not reach them. Names are those that their name servers know.

Source: docs.docker.com, "Macvlan network driver", "IPvlan network driver"; kernel ipvlan.rst.
"""

import errno
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from corral.network import network_options as options
from corral.network import subnets
from corral.network.links import InterfacePlan, SubLink, link_exists
from corral.network.model import Network, NetworkSpec
from corral.network.ownership import owner
from corral.network.pool import NetnsPool, is_pinned
from corral.rpc.errors import FailedPrecondition, InvalidArgument
from corral.store import failpoint

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

MACVLAN, IPVLAN = "macvlan", "ipvlan"
_CABLE_END = "end"
_PROBE = "probe"


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
    pool: NetnsPool

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
        made = not self.stands(network)
        try:
            self._ensure_lower(netlink, network)
            self._try(netlink, network)
        except BaseException:
            if made:
                self.remove(netlink, network)
            raise

    def _try(self, netlink: "Netlink", network: Network) -> None:
        try:
            self._probe(netlink, network)
        except OSError as e:
            raise _refusal(network, e) from e

    def _probe(self, netlink: "Netlink", network: Network) -> None:
        """In a namespace that the next start sweeps away, should this process die."""
        namespace = self.pool.make()
        path = self.pool.path(namespace)
        try:
            plan = InterfacePlan(_PROBE, "", network.lower, "", 0, (), ())
            netlink.plug_sublink(plan, sublink(network), path, self._seclusion(network))
            failpoint("network.create.after_probe")
            netlink.delete_inside(path, _PROBE)  # at once: some parents carry but one
        finally:
            self.pool.discard(namespace)

    def _seclusion(self, network: Network) -> Path | None:
        return self.pool.path(network.bridge) if network.is_secluded else None

    def stands(self, network: Network) -> bool:
        path = self._seclusion(network)
        return link_exists(network.lower) if path is None else is_pinned(path)

    def build(self, netlink: "Netlink", network: Network) -> bool:
        self._ensure_lower(netlink, network)
        failpoint("network.build.after_bridge")
        return False

    def _ensure_lower(self, netlink: "Netlink", network: Network) -> None:
        if network.is_secluded:
            if not self.stands(network):
                self.pool.make_kept(network.bridge, lambda: netlink.lay_cable(network.bridge, _CABLE_END))
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
        if network.is_secluded:
            self.pool.discard(network.bridge)
        elif network.lower == network.bridge:
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
