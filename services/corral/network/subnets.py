"""Choosing and checking subnets, gateways and hardware addresses. Pure functions."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

from corral.network.ipam import Address, Subnet, unusable
from corral.network.model import Range
from corral.rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
# Linux: at most 15 bytes, neither "." nor "..", no slash, colon or white space. This is a little narrower.
_INTERFACE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,14}")


def parse_subnet(text: str, what: str = "subnet") -> Subnet:
    """A subnet in CIDR form. Raises InvalidArgument, also where bits after the prefix are set."""
    try:
        if "/" not in text:
            raise ValueError("it has no prefix length")
        return ip_network(text)
    except ValueError as e:
        raise InvalidArgument(f'{what} {text!r} is not of the form "10.1.0.0/24": {e}', reason="BAD_SUBNET") from e


def parse_address(text: str, what: str, *, version: int | None = None) -> Address:
    """An IP address. Raises InvalidArgument."""
    try:
        address = ip_address(text)
    except ValueError as e:
        raise InvalidArgument(f"{what} {text!r} is not an IP address", reason="BAD_ADDRESS") from e
    if version is not None and address.version != version:
        raise InvalidArgument(f"{what} {text} is not an IPv{version} address", reason="BAD_ADDRESS")
    return address


def parse_mac(text: str) -> str:
    """A unicast Ethernet address in lower case. Raises InvalidArgument."""
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise InvalidArgument(f"{text!r} is not a unicast Ethernet address like 02:42:0a:44:00:02", reason="BAD_MAC")
    return mac


def check_interface_name(name: str) -> str:
    """`name`, if a network interface can have it. Raises InvalidArgument."""
    if not _INTERFACE.fullmatch(name) or name in ("lo", "all", "default"):
        raise InvalidArgument(
            f"{name!r} is no name for a network interface: 1 to 15 letters, digits, '_', '.' or '-', and not 'lo'",
            reason="BAD_INTERFACE",
        )
    return name


def make_range(cidr: str, *, gateway: str = "", window: str = "", reserved: Sequence[str] = ()) -> Range:
    """One subnet of a network as asked for, checked. Raises InvalidArgument."""
    subnet = parse_subnet(cidr)
    check_usable(subnet)
    chosen = _inside(parse_address(gateway, "gateway"), subnet, "gateway") if gateway else first_usable(subnet)
    if chosen in unusable(subnet):
        raise InvalidArgument(f"gateway {chosen} is the network or broadcast address of {subnet}", reason="BAD_GATEWAY")
    part = parse_subnet(window, "range") if window else None
    if part is not None and not is_subnet(part, subnet):
        raise InvalidArgument(f"range {part} does not lie inside {subnet}", reason="BAD_RANGE")
    kept = tuple(_inside(parse_address(text, "reserved address"), subnet, "reserved address") for text in reserved)
    return Range(subnet, chosen, part, kept)


def check_usable(subnet: Subnet) -> None:
    """Raises InvalidArgument for subnets no network can have."""
    if (subnet.version == 4 and subnet.prefixlen > 30) or subnet.prefixlen > 126:
        raise InvalidArgument(f"{subnet} is too small: it must hold a gateway and a container", reason="BAD_SUBNET")
    if subnet.prefixlen < 8:
        raise InvalidArgument(f"{subnet} is too large: its prefix must be /8 or longer", reason="BAD_SUBNET")
    if subnet.is_loopback or subnet.is_multicast or subnet.is_link_local or subnet.is_unspecified:
        raise InvalidArgument(
            f"{subnet} is loopback, multicast or link-local: use a private subnet", reason="BAD_SUBNET"
        )


def first_usable(subnet: Subnet) -> Address:
    """The first address a host can have."""
    return subnet.network_address + 1


def _inside(address: Address, subnet: Subnet, what: str) -> Address:
    if address.version != subnet.version or address not in subnet:
        raise InvalidArgument(f"{what} {address} does not lie inside {subnet}", reason="BAD_ADDRESS")
    return address


def is_subnet(part: Subnet, whole: Subnet) -> bool:
    """Whether part lies inside whole; subnets of different IP versions never do."""
    if isinstance(part, IPv4Network) and isinstance(whole, IPv4Network):
        return part.subnet_of(whole)
    if isinstance(part, IPv6Network) and isinstance(whole, IPv6Network):
        return part.subnet_of(whole)
    return False


def overlapping(subnet: Subnet, taken: Mapping[Subnet, str]) -> tuple[Subnet, str] | None:
    """The first of `taken`, with its owner's name, that shares an address with subnet."""
    return next(((other, owner) for other, owner in taken.items() if _overlaps(subnet, other)), None)


def _overlaps(a: Subnet, b: Subnet) -> bool:
    return is_subnet(a, b) or is_subnet(b, a)


def refuse_overlap(subnet: Subnet, taken: Mapping[Subnet, str]) -> None:
    """Raises FailedPrecondition naming what the subnet overlaps."""
    if (found := overlapping(subnet, taken)) is not None:
        other, owner = found
        raise FailedPrecondition(
            f"subnet {subnet} overlaps {owner} ({other}): choose another with --subnet, or none to get a free one",
            reason="SUBNET_OVERLAPS",
            metadata={"subnet": str(subnet), "overlaps": str(other)},
        )


def choose(pools: Iterable[str], prefix: int, taken: Mapping[Subnet, str]) -> Subnet:
    """The first subnet of length `prefix` out of the pools that overlaps nothing. Raises ResourceExhausted."""
    for candidate in _candidates(pools, prefix, taken):
        return candidate
    raise ResourceExhausted(
        "no free subnet is left in the address pools: name one with --subnet, or add to `pools` in [network] of"
        " config.toml",
        reason="NO_FREE_SUBNET",
    )


def unique_local(taken: Mapping[Subnet, str]) -> Subnet:
    """A random IPv6 subnet /64 for use on one site, that overlaps nothing. Source: RFC 4193."""
    while True:
        packed = bytes([0xFD]) + os.urandom(5) + bytes(10)
        subnet = IPv6Network((packed, 64))
        if overlapping(subnet, taken) is None:
            return subnet


def _candidates(pools: Iterable[str], prefix: int, taken: Mapping[Subnet, str]) -> Iterator[Subnet]:
    """Free subnets in order. Skips past each obstacle at once, so a pool full of small ones costs no more than their
    count."""
    for text in pools:
        pool = parse_subnet(text, "pool")
        size = 1 << (pool.max_prefixlen - max(prefix, pool.prefixlen))
        start, end = int(pool.network_address), int(pool.network_address) + pool.num_addresses
        while start + size <= end:
            candidate = _subnet_at(pool, start, size)
            found = overlapping(candidate, taken)
            if found is None:
                yield candidate
                start += size
            else:
                after = int(found[0].network_address) + found[0].num_addresses
                start += max(size, -(-(after - start) // size) * size)


def _subnet_at(pool: Subnet, start: int, size: int) -> Subnet:
    prefix = pool.max_prefixlen - (size.bit_length() - 1)
    return IPv4Network((start, prefix)) if pool.version == 4 else IPv6Network((start, prefix))


def mac_of(address: Address) -> str:
    """A locally administered Ethernet address that follows from the IP address, so that a reused address keeps its
    MAC and no neighbour's cache goes stale. 0a:58 is what CNI's bridge plugin uses, too."""
    packed = address.packed[-4:] if isinstance(address, IPv4Address) else _folded(address.packed)
    return ":".join(f"{byte:02x}" for byte in (0x0A, 0x58, *packed))


def _folded(packed: bytes) -> bytes:
    return bytes(packed[-4 + i] ^ packed[4 + i] for i in range(4))
