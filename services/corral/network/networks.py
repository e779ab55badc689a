"""Networks: made, found, removed.

    Create   row CREATING   -> bridge, firewall -> row READY, journal
    Remove   row REMOVING   -> firewall, bridge -> row gone, journal

A next start undoes CREATING and finishes REMOVING (see corral.network.recovery). The default network is made when it is
first asked for, so a daemon that nobody uses leaves the host as it was.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from corral.network import allocations, ownership, store, subnets
from corral.network.allocations import Allocations
from corral.network.config import NetworkConfig
from corral.network.driver import Driver
from corral.network.ipam import Subnet
from corral.network.links import NetlinkThread, Route
from corral.network.model import (
    BRIDGE_DRIVER,
    BUILTIN_NAMESPACE,
    DEFAULT_NETWORK,
    EndpointKey,
    Network,
    NetworkSpec,
    NetworkState,
)
from corral.network.work import Work
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, InvalidArgument, NotFound
from corral.store import Database, Duplicate, Snapshot, Transaction, failpoint

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

log = structlog.get_logger()

ID_HEX_CHARS = 64
FORWARDING_FACT = "ip_forward_switched_on"
# Networks without a kernel object: their names are modes of Attach.
HOST = Network(id="0" * 63 + "1", namespace=BUILTIN_NAMESPACE, name="host", driver="host")
NONE = Network(id="0" * 63 + "2", namespace=BUILTIN_NAMESPACE, name="none", driver="none")
MIN_MTU, MAX_MTU = 576, 65535


@dataclass(frozen=True, slots=True)
class Described:
    """A network with what the store knows about its use."""

    network: Network
    usage: Sequence[tuple[int, int]]  # per range: held, free
    endpoints: Sequence[EndpointKey]


class Networks:
    """All networks of this engine."""

    def __init__(
        self,
        config: NetworkConfig,
        db: Database,
        thread: NetlinkThread,
        drivers: Sequence[Driver],
        held: Allocations,
        on_remove: Callable[[str], None],
    ) -> None:
        """on_remove: called with the id of a network that is about to go."""
        self._on_remove = on_remove
        self._config = config
        self._db = db
        self._thread = thread
        self._drivers = {driver.name: driver for driver in drivers}
        self._allocations = held
        self._making_default = asyncio.Lock()
        self._work = Work()
        self._built: set[str] = set()  # ids of networks that are known to stand in the kernel

    # Making

    async def create(self, spec: NetworkSpec) -> Network:
        """Make a network. Raises AlreadyExists, FailedPrecondition (overlap, interface name taken), InvalidArgument."""
        return await self._work.to_the_end(self._create(self._check(spec)))

    async def _create(self, spec: NetworkSpec) -> Network:
        is_bridge = spec.driver == BRIDGE_DRIVER
        routes, mtu = await self._thread.run(
            lambda netlink: (netlink.routes(), spec.mtu or (self._mtu(netlink) if is_bridge else 0))
        )
        network_id = secrets.token_hex(ID_HEX_CHARS // 2)
        network = Network(
            id=network_id,
            namespace=spec.namespace,
            name=spec.name,
            driver=spec.driver,
            bridge=spec.interface or ownership.name_for(network_id),
            ranges=tuple(spec.ranges),
            mtu=mtu,
            internal=spec.internal,
            ipv6=spec.ipv6 or any(part.subnet.version == 6 for part in spec.ranges),
            options=dict(spec.options),
            labels=dict(spec.labels),
            created_ns=time.time_ns(),
            state=NetworkState.CREATING,
        )
        network = await self._db.write(lambda transaction: self._insert(transaction, network, routes))
        try:
            failpoint("network.create.after_row")
            await self._thread.run(lambda netlink: self._build_new(netlink, network))
            failpoint("network.create.after_build")
            return await self._db.write(lambda transaction: _ready(transaction, network))
        except BaseException:
            await self._thread.run(lambda netlink: self._take_back(netlink, network))
            raise

    def _insert(self, transaction: Transaction, network: Network, routes: Iterable[Route]) -> Network:
        existing = store.networks(transaction)
        if any((other.namespace, other.name) == (network.namespace, network.name) for other in existing):
            raise AlreadyExists(
                f"network {network.name!r} already exists: choose another name, or remove it first",
                reason="NETWORK_EXISTS",
            )
        _refuse_shared_parent(existing, network)
        taken = self._taken(existing, routes)
        # The network of a parent is one that the host has a route to, and that is what it is for.
        others = taken if network.is_bridge else self._taken(existing, ())
        for part in network.ranges:
            subnets.refuse_overlap(part.subnet, others)
        versions = {part.subnet.version for part in network.ranges}
        if 4 not in versions and not network.is_cni:
            subnet = subnets.choose(self._config.pools, self._config.pool_prefix, taken)
            network = replace(network, ranges=(subnets.make_range(str(subnet)), *network.ranges))
        if network.ipv6 and 6 not in versions:
            network = replace(network, ranges=(*network.ranges, subnets.make_range(str(subnets.unique_local(taken)))))
        try:
            store.insert_network(transaction, network)
        except Duplicate as e:
            raise AlreadyExists(f"interface {network.bridge} belongs to another network") from e
        found = store.network_by_id(transaction, network.id)
        assert found is not None
        return found

    def _build_new(self, netlink: "Netlink", network: Network) -> None:
        """Build a network that never stood."""
        self.driver_of(network).prove(netlink, network)
        self._build(netlink, network)

    def _take_back(self, netlink: "Netlink", network: Network) -> None:
        """A network that could not be made is gone. While something of it is there, so is its row: Remove and the next
        start go by that."""
        self._built.discard(network.id)
        try:
            self.driver_of(network).remove(netlink, network)
        except (CorralError, OSError) as e:  # what is told is why it could not be made
            log.warning("network.create_not_undone", network=network.name, error=str(e))
            return
        self._db.write_sync(lambda transaction: store.delete_network(transaction, network.id))

    def driver_of(self, network: Network) -> Driver:
        """Whose network it is."""
        return self._drivers[network.driver]

    def _check(self, spec: NetworkSpec) -> NetworkSpec:
        """Raises InvalidArgument, AlreadyExists."""
        driver = self._drivers.get(spec.driver)
        if driver is None:
            known = ", ".join(self._drivers)
            raise InvalidArgument(f"there is no network driver {spec.driver!r}: use {known}", reason="BAD_DRIVER")
        spec = driver.check(spec)
        _check(spec)
        return spec

    def _build(self, netlink: "Netlink", network: Network) -> None:
        if self.driver_of(network).build(netlink, network):
            self._db.write_sync(lambda transaction: store.remember(transaction, FORWARDING_FACT, str(time.time_ns())))
        self._built.add(network.id)

    def _mtu(self, netlink: "Netlink") -> int:
        return self._config.mtu or netlink.default_mtu()

    @staticmethod
    def _taken(existing: Iterable[Network], routes: Iterable[Route]) -> dict[Subnet, str]:
        """Subnets that a new network must not overlap, each with its owner. Routes through our own bridges are our
        networks."""
        existing = list(existing)
        ours = {network.bridge for network in existing if network.is_bridge}
        taken = {part.subnet: f"network {network.name!r}" for network in existing for part in network.ranges}
        for route in routes:
            if route.interface not in ours and route.subnet not in taken:
                taken[route.subnet] = f"a route of the host through {route.interface or 'an interface that is gone'}"
        return taken

    # The default network

    async def default(self) -> Network:
        """The default network, made if need be. Its bridge may still have to be built."""
        async with self._making_default:
            found = self._db.read_sync(_default)
            if found is None:
                routes, mtu = await self._thread.run(lambda netlink: (netlink.routes(), self._mtu(netlink)))
                found = await self._db.write(lambda transaction: self._insert_default(transaction, routes, mtu))
            return found

    def _insert_default(self, transaction: Transaction, routes: Sequence[Route], mtu: int) -> Network:
        existing = store.networks(transaction)
        # A bridge of that name without a row is left from an engine whose database is gone.
        others = [route for route in routes if route.interface != self._config.bridge]
        subnet = self._default_subnet(self._taken(existing, others))
        network = Network(
            id=secrets.token_hex(ID_HEX_CHARS // 2),
            namespace=BUILTIN_NAMESPACE,
            name=DEFAULT_NETWORK,
            driver=BRIDGE_DRIVER,
            bridge=self._config.bridge,
            ranges=(subnets.make_range(str(subnet)),),
            mtu=mtu,
            created_ns=time.time_ns(),
        )
        store.insert_network(transaction, network)
        found = _default(transaction)
        assert found is not None
        return found

    def _default_subnet(self, taken: Mapping[Subnet, str]) -> Subnet:
        wanted = subnets.parse_subnet(self._config.subnet)
        if subnets.overlapping(wanted, taken) is None:
            return wanted
        return subnets.choose(self._config.pools, 0, taken)

    # Finding

    async def get(self, namespace: str, name: str) -> Network:
        """The network with that name, id or unambiguous prefix of an id. Raises NotFound, InvalidArgument."""
        if name == DEFAULT_NETWORK:
            return await self.default()
        for builtin in (HOST, NONE):
            if name in (builtin.name, builtin.id):
                return builtin
        found = self._db.read_sync(lambda snapshot: store.find_networks(snapshot, namespace, name)) if name else []
        if not found:
            raise NotFound(
                f"there is no network {name!r}: `corral network ls` lists those there are",
                reason="NETWORK_NOT_FOUND",
                metadata={"network": name},
            )
        if len(found) > 1:
            raise InvalidArgument(f"{name!r} is the beginning of {len(found)} network ids: give more of it")
        return found[0]

    async def describe(self, namespace: str, name: str) -> Described:
        """A network with its use. Raises as get()."""
        network = await self.get(namespace, name)
        return await self._db.read(lambda snapshot: _described(snapshot, namespace, network))

    async def describe_all(self, namespace: str) -> list[Described]:
        """All networks seen from a namespace, the builtin ones first."""
        await self.default()

        def read(snapshot: Snapshot) -> list[Described]:
            found = [one for one in store.networks(snapshot, namespace) if one.state is NetworkState.READY]
            found.sort(key=lambda network: not network.builtin)
            return [_described(snapshot, namespace, network) for network in (*found[:1], HOST, NONE, *found[1:])]

        return await self._db.read(read)

    # Use and removal

    def is_built(self, network: Network) -> bool:
        """Whether it is known to have stood in the kernel since this process began."""
        return network.id in self._built

    def stands(self, network: Network) -> bool:
        """Whether the link that its endpoints hang on is there."""
        return self.driver_of(network).stands(network)

    def build_anew(self, netlink: "Netlink", network: Network) -> None:
        """Mend what stood. On the netlink thread."""
        self._build(netlink, network)

    def build_missing(self, netlink: "Netlink", networks: Iterable[Network]) -> None:
        """Make sure that these stand in the kernel. On the netlink thread."""
        for network in networks:
            if network.id not in self._built or not self.stands(network):
                self._build(netlink, network)

    async def remove(self, namespace: str, name: str) -> None:
        """Remove a network. Raises NotFound, FailedPrecondition while it is used or if it is builtin."""
        await self._work.to_the_end(self._remove(namespace, name))

    async def _remove(self, namespace: str, name: str) -> None:
        network = await self.get(namespace, name)
        if network.builtin:
            raise FailedPrecondition(f"network {network.name!r} is builtin and cannot be removed", reason="BUILTIN")
        await self._db.write(lambda transaction: _claim_removal(transaction, network))
        failpoint("network.remove.after_row")
        self._built.discard(network.id)
        self._on_remove(network.id)
        await self._thread.run(lambda netlink: self.driver_of(network).remove(netlink, network))
        await self._db.write(lambda transaction: self._forget(transaction, network))

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._work.close()

    def _forget(self, transaction: Transaction, network: Network) -> None:
        store.delete_network(transaction, network.id)
        self._allocations.forget(network.ranges)
        transaction.journal("network.removed", network.name, {"id": network.id}, namespace=network.namespace)


def _check(spec: NetworkSpec) -> None:
    if spec.name in (DEFAULT_NETWORK, HOST.name, NONE.name, "container", "default"):
        raise AlreadyExists(f"network {spec.name!r} is builtin: choose another name", reason="NETWORK_EXISTS")
    if spec.mtu and not MIN_MTU <= spec.mtu <= MAX_MTU:
        raise InvalidArgument(f"MTU {spec.mtu} is not between {MIN_MTU} and {MAX_MTU}", reason="BAD_MTU")
    if spec.interface:
        subnets.check_interface_name(spec.interface)
    for number, part in enumerate(spec.ranges):
        others = {other.subnet: f"subnet {other.subnet} of the same network" for other in spec.ranges[:number]}
        subnets.refuse_overlap(part.subnet, others)


def _refuse_shared_parent(existing: Iterable[Network], network: Network) -> None:
    for other in existing:
        if not network.is_bridge and network.lower in (other.lower, other.bridge):
            raise FailedPrecondition(
                f"{network.lower} carries network {other.name!r} already: name another parent, or a VLAN of it, like"
                f" {network.lower}.10",
                reason="PARENT_TAKEN",
            )


def _ready(transaction: Transaction, network: Network) -> Network:
    recorded = store.network_by_id(transaction, network.id)
    if recorded is None or recorded.state is not NetworkState.CREATING:
        raise NotFound(f"network {network.name!r} was removed while it was made", reason="NETWORK_NOT_FOUND")
    store.set_network_state(transaction, network.id, NetworkState.READY)
    payload = {"id": network.id, "subnets": [str(part.subnet) for part in network.ranges]}
    transaction.journal("network.created", network.name, payload, namespace=network.namespace)
    return replace(network, state=NetworkState.READY)


def _claim_removal(transaction: Transaction, network: Network) -> None:
    users = store.endpoint_ids(transaction, network.id, None)
    if users:
        names = ", ".join(key.id[:12] for key in users[:3]) + (", …" if len(users) > 3 else "")
        raise FailedPrecondition(
            f"network {network.name!r} is used by {len(users)} container{'s' * (len(users) > 1)} ({names}):"
            " remove them first",
            reason="NETWORK_IN_USE",
            metadata={"network": network.name},
        )
    store.set_network_state(transaction, network.id, NetworkState.REMOVING)


def _default(snapshot: Snapshot) -> Network | None:
    found = store.find_networks(snapshot, BUILTIN_NAMESPACE, DEFAULT_NETWORK)
    return found[0] if found else None


def _described(snapshot: Snapshot, namespace: str, network: Network) -> Described:
    usage = [allocations.usage(snapshot, part) for part in network.ranges]
    return Described(network, usage, store.endpoint_ids(snapshot, network.id, namespace))
