"""Which interfaces and addresses an endpoint gets: recorded in one transaction, before anything is made."""

import os
from collections.abc import Sequence
from ipaddress import ip_address

from corral.network import store, subnets
from corral.network.allocations import Allocations
from corral.network.cni import documents
from corral.network.cni.driver import configuration_of
from corral.network.ipam import Address
from corral.network.model import Attachment, Endpoint, EndpointKey, Interface, Network, NetworkState, Range
from corral.network.sublinks import has_own_mac
from corral.rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from corral.store import Duplicate, Transaction

HOST_NAME_BYTES = 4


def insert_interfaces(
    transaction: Transaction,
    endpoint: Endpoint,
    wanted: Sequence[tuple[Attachment, Network]],
    held: Allocations,
    host_prefix: str,
) -> None:
    """Write the rows of an endpoint's interfaces and addresses. Raises what tells the user why one cannot be had."""
    taken = {interface.name for interface in endpoint.interfaces}
    taken |= {attachment.interface for attachment, _ in wanted if attachment.interface}
    for attachment, network in wanted:
        name = attachment.interface or _free_name(taken)
        taken.add(name)
        _insert_interface(transaction, endpoint.key, attachment, network, name, held, host_prefix)


def _insert_interface(
    transaction: Transaction,
    key: EndpointKey,
    attachment: Attachment,
    network: Network,
    name: str,
    held: Allocations,
    host_prefix: str,
) -> None:
    now = store.network_by_id(transaction, network.id)
    if now is None or now.state is not NetworkState.READY:
        raise FailedPrecondition(f"network {network.name!r} is being removed", reason="NETWORK_GOING")
    if network.is_cni:
        _require_capabilities(attachment, network)
    elif attachment.mac and not has_own_mac(network):
        raise InvalidArgument(
            f"interfaces in network {network.name!r} have the hardware address of its parent: leave out --mac-address",
            reason="BAD_MAC",
        )
    check_ways(attachment, network)
    host_name = f"{host_prefix}{os.urandom(HOST_NAME_BYTES).hex()}"
    try:
        interface_id = store.insert_interface(
            transaction, key, Interface(network, name, host_name, attachment.mac, aliases=attachment.aliases)
        )
    except Duplicate as e:
        raise InvalidArgument(
            f"network {network.name!r} or interface {name!r} is named twice: once is enough", reason="TWICE"
        ) from e
    if network.is_cni:
        return
    addresses = _take_addresses(transaction, attachment, network, interface_id, held)
    if not attachment.mac and has_own_mac(network):
        store.set_interface_mac(transaction, interface_id, subnets.mac_of(addresses[0]))


def check_ways(attachment: Attachment, network: Network) -> None:
    """Raises InvalidArgument for limits and routes that the network cannot have."""
    if network.is_cni and (attachment.receive_bps or attachment.send_bps or attachment.routes):
        raise InvalidArgument(
            f"rates and routes in network {network.name!r} are its plugins' (bandwidth, host-local): say so in its"
            " configuration",
            reason="BAD_OPTION",
        )
    if attachment.receive_bps and not network.is_bridge:
        raise InvalidArgument(
            f"what is received in network {network.name!r} (driver {network.driver}) cannot be limited: limit what is"
            " sent only, RATE/RATE with 0 for no limit",
            reason="BAD_OPTION",
        )
    for _, gateway in attachment.routes:
        if not any(ip_address(gateway) in part.subnet for part in network.ranges):
            raise InvalidArgument(f"gateway {gateway} is not in network {network.name!r}", reason="BAD_GATEWAY")


def _require_capabilities(attachment: Attachment, network: Network) -> None:
    """Raises InvalidArgument for what no plugin of the network would heed."""
    asked = {documents.IPS: attachment.ipv4 or attachment.ipv6, documents.MAC: attachment.mac}
    for capability, value in asked.items():
        if value and not configuration_of(network).has(capability):
            raise InvalidArgument(
                f"no plugin of network {network.name!r} takes {value}: its configuration names no capability"
                f" {capability!r}",
                reason="NO_CAPABILITY",
            )


def _take_addresses(
    transaction: Transaction, attachment: Attachment, network: Network, interface_id: int, held: Allocations
) -> list[Address]:
    """One address of each IP version that the network has."""
    addresses = []
    for version, asked in ((4, attachment.ipv4), (6, attachment.ipv6)):
        ranges = [part for part in network.ranges if part.subnet.version == version]
        if asked:
            addresses.append(_take_this(transaction, asked, version, ranges, network, interface_id, held))
        elif ranges:
            addresses.append(_take_next(transaction, ranges, network, interface_id, held))
    return addresses


def _take_this(
    transaction: Transaction,
    asked: str,
    version: int,
    ranges: Sequence[Range],
    network: Network,
    interface_id: int,
    held: Allocations,
) -> Address:
    address = subnets.parse_address(asked, "address", version=version)
    for part in ranges:
        if address in part.subnet:
            held.hold(transaction, part, address, interface_id)
            return address
    known = ", ".join(str(part.subnet) for part in ranges) or "none"
    raise InvalidArgument(
        f"address {address} is in no IPv{version} subnet of network {network.name!r} ({known})", reason="BAD_ADDRESS"
    )


def _take_next(
    transaction: Transaction, ranges: Sequence[Range], network: Network, interface_id: int, held: Allocations
) -> Address:
    *others, last = ranges
    for part in others:
        try:
            return held.allocate(transaction, network, part, interface_id)
        except ResourceExhausted:
            continue
    return held.allocate(transaction, network, last, interface_id)


def _free_name(taken: set[str]) -> str:
    number = 0
    while (name := f"eth{number}") in taken:
        number += 1
    return name
