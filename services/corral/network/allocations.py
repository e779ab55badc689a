"""Which addresses are held: rows are the truth, bitmaps derived from them find the next one fast.

A bitmap is a hint. The primary key (range, address) decides, so a stale one (a rolled back transaction, another writer)
costs a second look at the rows and never gives an address out twice.
"""

from collections.abc import Iterable
from ipaddress import ip_address

from corral.network.ipam import Address, Exhausted, Pool, unusable
from corral.network.model import Network, Range
from corral.rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from corral.store import Duplicate, Snapshot, Transaction


class Allocations:
    """Gives out addresses inside transactions. Used on the database's writer thread only, but for usage()."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def allocate(self, transaction: Transaction, network: Network, part: Range, interface_id: int) -> Address:
        """Give the interface the next free address. Raises ResourceExhausted."""
        for fresh in (False, True):
            pool = self._pool(transaction, part, fresh=fresh)
            try:
                pool, address = pool.allocate()
                _insert(transaction, part, address, interface_id)
            except (Exhausted, Duplicate) as e:
                problem = e
                continue
            transaction.execute("UPDATE ranges SET cursor = ? WHERE id = ?", (pool.cursor, part.id))
            self._pools[part.id] = pool
            return address
        raise ResourceExhausted(
            f"network {network.name!r} has no free address left in {part.window or part.subnet}:"
            " remove containers from it, or create a larger network",
            reason="NO_FREE_ADDRESS",
            metadata={"network": network.name},
        ) from problem

    def hold(self, transaction: Transaction, part: Range, address: Address, interface_id: int) -> None:
        """Give the interface this very address. Raises FailedPrecondition if somebody has it, InvalidArgument if nobody
        may."""
        if address in unusable(part.subnet):
            raise InvalidArgument(
                f"address {address} cannot be used: it is the network or broadcast address of {part.subnet}",
                reason="BAD_ADDRESS",
            )
        if address == part.gateway:
            raise FailedPrecondition(f"address {address} is the gateway of {part.subnet}", reason="ADDRESS_TAKEN")
        try:
            _insert(transaction, part, address, interface_id)
        except Duplicate as e:
            raise FailedPrecondition(
                f"address {address} is taken: choose another, or let one be chosen",
                reason="ADDRESS_TAKEN",
                metadata={"address": str(address)},
            ) from e
        if (pool := self._pools.get(part.id)) is not None:
            self._pools[part.id] = pool.hold([address])

    def release(self, held: Iterable[tuple[Address, Range]]) -> None:
        """These are free again: their rows are deleted, in the transaction that calls this."""
        for address, part in held:
            if (pool := self._pools.get(part.id)) is not None:
                self._pools[part.id] = pool.release([address])

    def forget(self, ranges: Iterable[Range]) -> None:
        """The ranges are gone."""
        for part in ranges:
            self._pools.pop(part.id, None)

    def _pool(self, snapshot: Snapshot, part: Range, *, fresh: bool) -> Pool:
        """The bitmap of a range; fresh: made from the rows again."""
        pool = None if fresh else self._pools.get(part.id)
        if pool is None:
            pool = self._pools[part.id] = load(snapshot, part)
        return pool


def load(snapshot: Snapshot, part: Range) -> Pool:
    """The bitmap that the rows describe."""
    row = snapshot.one("SELECT cursor FROM ranges WHERE id = ?", (part.id,))
    cursor = 0 if row is None else int(row[0])
    reserved = (part.gateway, *part.reserved)
    held = snapshot.execute("SELECT address FROM allocations WHERE range = ?", (part.id,))
    pool = Pool.of(part.subnet, window=part.window, reserved=reserved, cursor=cursor)
    return pool.hold(ip_address(row[0]) for row in held)


def usage(snapshot: Snapshot, part: Range) -> tuple[int, int]:
    """How many addresses of the range are held, and how many are free."""
    row = snapshot.one("SELECT count(*) FROM allocations WHERE range = ?", (part.id,))
    used = 0 if row is None else int(row[0])
    capacity = Pool.of(part.subnet, window=part.window, reserved=(part.gateway, *part.reserved)).capacity
    return used, max(0, capacity - used)


def _insert(transaction: Transaction, part: Range, address: Address, interface_id: int) -> None:
    transaction.execute(
        "INSERT INTO allocations (range, address, interface) VALUES (?, ?, ?)", (part.id, str(address), interface_id)
    )
