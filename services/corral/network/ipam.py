"""Address arithmetic: which address of a subnet comes next. Values in, values out; what holds an address is a row
elsewhere.

A Pool is one subnet's window of addresses with a bitmap of those that are taken. Addresses are handed out round
robin: one just freed is the last to be used again, so that what still remembers it (ARP caches, connections, logs)
has time to forget.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Self

type Address = IPv4Address | IPv6Address
type Subnet = IPv4Network | IPv6Network

LEAF_BITS = 1024
_LEAF_FULL = (1 << LEAF_BITS) - 1
# A bitmap of more would cost more than it is worth; an IPv6 subnet has 2^64 addresses.
MAX_WINDOW = 1 << 24


class Exhausted(Exception):
    """No free address in the pool."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A set of numbers below `size`, as leaves of LEAF_BITS bits and a summary of which leaves are full.

    Finding a free number looks at one bit of the summary and one leaf, however many numbers are taken.
    """

    size: int
    leaves: tuple[int, ...]
    full: int

    @classmethod
    def empty(cls, size: int) -> Self:
        count, rest = divmod(size, LEAF_BITS)
        leaves = (0,) * count
        if rest:  # the numbers past the end count as taken
            leaves += (_LEAF_FULL & ~((1 << rest) - 1),)
        return cls(size, leaves, 0)

    def __contains__(self, number: int) -> bool:
        leaf, bit = divmod(number, LEAF_BITS)
        return bool(self.leaves[leaf] >> bit & 1)

    def add(self, number: int) -> Self:
        """With the number in it."""
        leaf, bit = divmod(number, LEAF_BITS)
        return self._with_leaf(leaf, self.leaves[leaf] | 1 << bit)

    def remove(self, number: int) -> Self:
        """Without the number."""
        leaf, bit = divmod(number, LEAF_BITS)
        return self._with_leaf(leaf, self.leaves[leaf] & ~(1 << bit))

    def add_all(self, numbers: Iterable[int]) -> Self:
        """With all the numbers in it, in time proportional to their count."""
        leaves, full = list(self.leaves), self.full
        for number in numbers:
            leaf, bit = divmod(number, LEAF_BITS)
            leaves[leaf] |= 1 << bit
            if leaves[leaf] == _LEAF_FULL:
                full |= 1 << leaf
        return replace(self, leaves=tuple(leaves), full=full)

    def next_free(self, start: int) -> int | None:
        """The first number from start on that is not in it, going round at the end; None if there is none."""
        leaf, bit = divmod(start, LEAF_BITS)
        position = _lowest_zero(self.leaves[leaf], bit)
        if position < LEAF_BITS:
            return leaf * LEAF_BITS + position
        for first in (leaf + 1, 0):
            following = _lowest_zero(self.full, first)
            if following < len(self.leaves):
                return following * LEAF_BITS + _lowest_zero(self.leaves[following], 0)
        return None

    def count(self) -> int:
        """How many numbers are in it."""
        taken = sum(leaf.bit_count() for leaf in self.leaves)
        return taken - (len(self.leaves) * LEAF_BITS - self.size)

    def _with_leaf(self, leaf: int, value: int) -> Self:
        leaves = (*self.leaves[:leaf], value, *self.leaves[leaf + 1 :])
        full = self.full | 1 << leaf if value == _LEAF_FULL else self.full & ~(1 << leaf)
        return replace(self, leaves=leaves, full=full)


def _lowest_zero(bits: int, start: int) -> int:
    """The lowest position from start on whose bit is 0; past the last 1 there always is one."""
    inverted = ~(bits >> start)
    return start + (inverted & -inverted).bit_length() - 1


@dataclass(frozen=True, slots=True)
class Pool:
    """The addresses of one subnet that may be given out: `bitmap.size` of them, counted from `first`."""

    subnet: Subnet
    first: int
    bitmap: Bitmap
    # Taken from the start: network, broadcast, gateway and what the user reserved.
    reserved: frozenset[int]
    # Where the next search begins.
    cursor: int = 0

    @classmethod
    def of(
        cls, subnet: Subnet, *, window: Subnet | None = None, reserved: Iterable[Address] = (), cursor: int = 0
    ) -> Self:
        """A pool of all addresses in window, a part of the subnet (None: the whole), but the network's own, the
        broadcast address and those reserved."""
        window = window or subnet
        first = int(window.network_address)
        size = min(window.num_addresses, MAX_WINDOW)
        taken = {int(address) - first for address in (*reserved, *unusable(subnet))}
        inside = frozenset(number for number in taken if 0 <= number < size)
        bitmap = Bitmap.empty(size).add_all(inside)
        return cls(subnet, first, bitmap, inside, cursor if 0 <= cursor < size else 0)

    def allocate(self) -> tuple[Self, Address]:
        """The next free address, round robin, and the pool without it. Raises Exhausted."""
        number = self.bitmap.next_free(self.cursor)
        if number is None:
            raise Exhausted(f"all {self.bitmap.size - len(self.reserved)} addresses are in use")
        after = (number + 1) % self.bitmap.size
        return replace(self, bitmap=self.bitmap.add(number), cursor=after), self.address(number)

    def hold(self, addresses: Iterable[Address]) -> Self:
        """The pool with these taken. Those outside the window are none of its business."""
        numbers = (self.number(address) for address in addresses)
        return replace(self, bitmap=self.bitmap.add_all(number for number in numbers if number is not None))

    def release(self, addresses: Iterable[Address]) -> Self:
        """The pool with these free again; the cursor stays, so they come last. What is reserved stays taken."""
        bitmap = self.bitmap
        for address in addresses:
            number = self.number(address)
            if number is not None and number not in self.reserved:
                bitmap = bitmap.remove(number)
        return replace(self, bitmap=bitmap)

    def is_free(self, address: Address) -> bool:
        """Whether the address is in the window and not taken."""
        number = self.number(address)
        return number is not None and number not in self.bitmap

    @property
    def capacity(self) -> int:
        """How many addresses could be held at once."""
        return self.bitmap.size - len(self.reserved)

    @property
    def used(self) -> int:
        """How many addresses are held."""
        return self.bitmap.count() - len(self.reserved)

    def number(self, address: Address) -> int | None:
        """The address as a position in the window; None if it lies outside."""
        number = int(address) - self.first
        same_version = address.version == self.subnet.version
        return number if same_version and 0 <= number < self.bitmap.size else None

    def address(self, number: int) -> Address:
        """The address at a position."""
        kind = IPv4Address if self.subnet.version == 4 else IPv6Address
        return kind(self.first + number)


def unusable(subnet: Subnet) -> tuple[Address, ...]:
    """Addresses of the subnet that no host may have: its own and, in IPv4, the broadcast address. None in a /31 (RFC
    3021), /32, /127 (RFC 6164) or /128."""
    if subnet.max_prefixlen - subnet.prefixlen <= 1:
        return ()
    own, last = subnet.network_address, subnet.broadcast_address
    return (own, last) if subnet.version == 4 else (own,)
