"""Endpoints that stand: put into one more network, or taken out of one.

    connect      rows of interface and address  ->  veth pair, ports, files  ->  request, journal
    disconnect   ports, veth pair, routes, files  ->  rows, address and request, journal

What fails in connect is undone; if a plugin of CNI refuses that, by the next call about the endpoint or the next start.
A daemon that dies on the way leaves an interface that no request names, which the next start removes, or lacks a link
that one names, which it makes (see corral.network.recovery).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from corral.network import planning, store
from corral.network.allocations import Allocations
from corral.network.cni import rows
from corral.network.model import DEFAULT_NETWORK, Attachment, Endpoint, Interface, Mode, Network, Request
from corral.network.ports import check_reachable
from corral.network.resolver import Resolvers
from corral.network.standing import Standing
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, InvalidArgument, NotFound
from corral.store import Database, Transaction, failpoint

log = structlog.get_logger()

type Wanted = Sequence[tuple[Attachment, Network]]


def attachments_of(request: Request) -> tuple[Attachment, ...]:
    """The networks asked for, in the order of the interfaces. Pure."""
    if request.mode is not Mode.NETWORKS:
        return ()
    return request.attachments or (Attachment(DEFAULT_NETWORK),)


def differ_in_networks(one: Request, other: Request) -> bool:
    """Whether both ask for networks, or none, and for the same in all else but ports. Pure."""
    modes = {one.mode, other.mode}
    return modes <= {Mode.NETWORKS, Mode.NONE} and _rest(one) == _rest(other)


def _rest(request: Request) -> Request:
    return replace(request, mode=Mode.NONE, attachments=(), ports=())


class Connections:
    """See the module. Callers hold the endpoint's lock."""

    def __init__(
        self, db: Database, held: Allocations, standing: Standing, resolvers: Resolvers, *, host_prefix: str
    ) -> None:
        self._db = db
        self._allocations = held
        self._standing = standing
        self._resolvers = resolvers
        self._host_prefix = host_prefix

    async def connect(self, endpoint: Endpoint, attachment: Attachment, network: Network) -> Endpoint:
        """Put it into one more network; the same call again gives the same answer.

        Raises AlreadyExists if it is in there in another way, InvalidArgument, FailedPrecondition (address taken, a
        namespace of somebody else), ResourceExhausted (no address left).
        """
        _require_networks(endpoint)
        asked = attachments_of(endpoint.request)
        for known, interface in zip(asked, endpoint.interfaces, strict=True):
            if interface.network.id == network.id:
                if _alike(known, attachment):
                    return endpoint
                raise AlreadyExists(
                    f"container {endpoint.key.id[:12]} is in network {network.name!r} already: disconnect it first",
                    reason="CONNECTED",
                )
        grown = replace(endpoint.request, mode=Mode.NETWORKS, attachments=(*asked, attachment))
        connected = await self._db.write(lambda transaction: self._insert(transaction, endpoint, grown, network))
        *_, made = connected.interfaces
        try:
            failpoint("network.connect.after_row")
            connected = await self._standing.plug(endpoint, connected)
            *_, made = connected.interfaces
            failpoint("network.connect.before_request")
            await self._db.write(lambda transaction: _connected(transaction, connected, made))
        except BaseException:
            await self._undo_connect(connected, endpoint, made)
            raise
        self._resolvers.changed()
        return connected

    async def _undo_connect(self, connected: Endpoint, endpoint: Endpoint, made: Interface) -> None:
        try:
            await self._standing.unplug(connected, endpoint, made)
        except (CorralError, OSError) as e:  # what is told is why the connect failed
            log.warning("network.connect_not_undone", endpoint=endpoint.key.id, error=str(e))
        finally:  # a link that is left is removed by the next start
            await self._db.write(lambda transaction: self._delete_unless_owed(transaction, endpoint, made))

    async def take_back(self, endpoint: Endpoint, made: Interface) -> Endpoint:
        """Undo a connect that could not be undone before. Raises FailedPrecondition with a plugin's words."""
        left = replace(endpoint, interfaces=tuple(each for each in endpoint.interfaces if each is not made))
        await self._standing.unplug(endpoint, left, made)
        await self._db.write(lambda transaction: self._delete(transaction, left, made))
        self._resolvers.changed()
        return left

    async def disconnect(self, endpoint: Endpoint, network: Network) -> Endpoint:
        """Take it out of a network. Raises NotFound if it is not in there, FailedPrecondition if a published port
        would lead nowhere."""
        _require_networks(endpoint)
        gone = next((each for each in endpoint.interfaces if each.network.id == network.id), None)
        if gone is None:
            raise NotFound(
                f"container {endpoint.key.id[:12]} is not in network {network.name!r}", reason="NOT_CONNECTED"
            )
        left = _without(endpoint, gone)
        _require_reachable(left, network)
        await self._standing.unplug(endpoint, left, gone)
        failpoint("network.disconnect.before_rows")

        def write(transaction: Transaction) -> None:
            self._delete(transaction, left, gone)
            store.set_request(transaction, left.key, left.request)
            payload = {"network": network.name}
            transaction.journal("endpoint.disconnected", left.key.id, payload, namespace=left.key.namespace)

        await self._db.write(write)
        self._resolvers.changed()
        return left

    async def follow(self, endpoint: Endpoint, request: Request, wanted: Wanted) -> Endpoint:
        """Make its networks, and its names in them, those of another request. Raises as connect() and disconnect()."""
        by_id = {network.id: attachment for attachment, network in wanted}
        for attachment, network in wanted:  # before anything is changed
            planning.check_ways(attachment, network)
        endpoint = await self._set_rates(endpoint, by_id)
        pairs = list(zip(attachments_of(endpoint.request), endpoint.interfaces, strict=True))
        known = {interface.network.id for _, interface in pairs}
        # New ones first, as published ports must lead somewhere.
        for attachment, network in [each for each in wanted if each[1].id not in known]:
            endpoint = await self.connect(endpoint, attachment, network)
        for attachment, network in [(one, each.network) for one, each in pairs]:
            if network.id not in by_id or not _alike(attachment, by_id[network.id]):
                endpoint = await self.disconnect(endpoint, network)
        for attachment, network in wanted:
            endpoint = await self.connect(endpoint, attachment, network)
        aliases = {network.id: attachment.aliases for attachment, network in wanted}

        def write(transaction: Transaction) -> Endpoint:
            for interface in endpoint.interfaces:
                store.set_aliases(transaction, endpoint.key, interface, aliases[interface.network.id])
            ordered = {network.id: attachment for attachment, network in wanted}
            asked = tuple(ordered[interface.network.id] for interface in endpoint.interfaces)
            store.set_request(transaction, endpoint.key, replace(request, attachments=asked))
            return _found(transaction, endpoint)

        renamed = await self._db.write(write)
        self._resolvers.changed()
        return renamed

    async def _set_rates(self, endpoint: Endpoint, wanted: Mapping[str, Attachment]) -> Endpoint:
        """Those of all its networks, while it goes on; a daemon that dies before the row is written is asked for the
        same again. wanted: by ids of networks."""
        asked, names = list(attachments_of(endpoint.request)), []
        for number, interface in enumerate(endpoint.interfaces):
            new = wanted.get(interface.network.id)
            if new is not None and _differ_in_rates(asked[number], new):
                asked[number] = replace(asked[number], receive_bps=new.receive_bps, send_bps=new.send_bps)
                names.append(interface.name)
        if not names:
            return endpoint
        changed = replace(endpoint, request=replace(endpoint.request, attachments=tuple(asked)))
        await self._standing.set_rates(endpoint, changed, names)
        await self._db.write(lambda transaction: store.set_request(transaction, changed.key, changed.request))
        return changed

    # Rows

    def _insert(self, transaction: Transaction, endpoint: Endpoint, request: Request, network: Network) -> Endpoint:
        wanted = [(request.attachments[-1], network)]
        planning.insert_interfaces(transaction, endpoint, wanted, self._allocations, self._host_prefix)
        return replace(_found(transaction, endpoint), request=request)

    def _delete(self, transaction: Transaction, endpoint: Endpoint, gone: Interface) -> None:
        store.delete_interface(transaction, endpoint.key, gone)
        self._allocations.release(gone.addresses)

    def _delete_unless_owed(self, transaction: Transaction, endpoint: Endpoint, gone: Interface) -> None:
        """Plugins of CNI that have something of it still are to be asked again."""
        if not rows.begun(transaction, endpoint.key, gone):
            self._delete(transaction, endpoint, gone)


def half_connected(endpoint: Endpoint) -> Sequence[Interface]:
    """Its interfaces that no request names: nobody was told of them. Pure."""
    return endpoint.interfaces[len(attachments_of(endpoint.request)) :]


def _connected(transaction: Transaction, endpoint: Endpoint, made: Interface) -> None:
    store.set_request(transaction, endpoint.key, endpoint.request)
    payload = {"network": made.network.name, "addresses": [str(address) for address, _ in made.addresses]}
    transaction.journal("endpoint.connected", endpoint.key.id, payload, namespace=endpoint.key.namespace)


def _found(transaction: Transaction, endpoint: Endpoint) -> Endpoint:
    found = store.endpoint(transaction, endpoint.key)
    assert found is not None, "its lock is held"
    return found


def _alike(one: Attachment, other: Attachment) -> bool:
    """But for names, and for how the network is called."""
    return replace(one, network="", aliases=()) == replace(other, network="", aliases=())


def _differ_in_rates(one: Attachment, other: Attachment) -> bool:
    """And in nothing else, but for names."""
    return not _alike(one, other) and _alike(
        replace(one, receive_bps=0, send_bps=0), replace(other, receive_bps=0, send_bps=0)
    )


def _without(endpoint: Endpoint, gone: Interface) -> Endpoint:
    pairs = zip(attachments_of(endpoint.request), endpoint.interfaces, strict=True)
    kept = [(attachment, interface) for attachment, interface in pairs if interface is not gone]
    request = replace(
        endpoint.request,
        mode=Mode.NETWORKS if kept else Mode.NONE,
        attachments=tuple(attachment for attachment, _ in kept),
    )
    return replace(endpoint, request=request, interfaces=tuple(interface for _, interface in kept))


def _require_networks(endpoint: Endpoint) -> None:
    if endpoint.mode not in (Mode.NETWORKS, Mode.NONE):
        raise FailedPrecondition(
            f"container {endpoint.key.id[:12]} has no network of its own (mode {endpoint.mode}): it can be in no other",
            reason="BAD_MODE",
        )


def _require_reachable(left: Endpoint, network: Network) -> None:
    try:
        check_reachable(left, left.ports)
    except InvalidArgument as e:
        raise FailedPrecondition(
            f"ports of the container are published by network {network.name!r}: connect it to another network with a"
            " way out first",
            reason="PORT_UNREACHABLE",
        ) from e
