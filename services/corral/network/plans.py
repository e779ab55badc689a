"""The links of an endpoint as they should be, from its rows. Pure."""

from collections.abc import Iterable

from corral.network import network_options, sublinks
from corral.network.cni import documents
from corral.network.links import InterfacePlan
from corral.network.model import Interface


def interface_plans(interfaces: Iterable[Interface]) -> list[InterfacePlan]:
    """In order. The first network with a way out has the default route. Those of CNI are made by plugins."""
    plans = []
    routed: set[int] = set()  # IP versions that have their default route
    for interface in interfaces:
        network = interface.network
        if network.is_cni:
            routed |= documents.routed_versions(interface.cni_result)
            continue
        first = [
            (address.version, part.gateway)
            for address, part in interface.addresses
            if not network.internal and address.version not in routed
        ]
        routed |= {version for version, _ in first}
        by_link = sublinks.routes_by_link(network)
        plans.append(
            InterfacePlan(
                name=interface.name,
                host_name=interface.host_name if network.is_bridge else "",
                bridge=network.lower,
                mac=interface.mac,
                mtu=network.mtu,
                addresses=[(address, part.subnet.prefixlen) for address, part in interface.addresses],
                gateways=[] if by_link else [gateway for _, gateway in first],
                versions_by_link=[version for version, _ in first] if by_link else [],
                sublink=None if network.is_bridge else sublinks.sublink(network),
                isolated=network.is_bridge and not network_options.may_talk(network),
            )
        )
    return plans
