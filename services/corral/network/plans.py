"""The links of an endpoint as they should be, from its rows. Pure."""

from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from itertools import chain, repeat

from corral.network import network_options, sublinks
from corral.network.cni import documents
from corral.network.links import InterfacePlan
from corral.network.model import Attachment, Endpoint


def interface_plans(endpoint: Endpoint) -> list[InterfacePlan]:
    """In order. The first network with a way out has the default route. Those of CNI are made by plugins."""
    plans = []
    routed: set[int] = set()  # IP versions that have their default route
    for interface, attachment in zip(endpoint.interfaces, attachments(endpoint), strict=False):
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
                secluded=network.is_secluded,
                isolated=network.is_bridge and not network_options.may_talk(network),
                receive_bps=attachment.receive_bps,
                send_bps=attachment.send_bps,
                routes=[(ip_network(subnet), ip_address(gateway)) for subnet, gateway in attachment.routes],
            )
        )
    return plans


def attachments(endpoint: Endpoint) -> Iterable[Attachment]:
    """How each interface was asked for; the default network may have been asked for without a word."""
    return chain(endpoint.request.attachments, repeat(Attachment("")))
