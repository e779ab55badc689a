"""Endpoints: attached, found, detached.

    Attach   row ATTACHING, addresses  ->  veth pairs, files  ->  row READY, journal
    Detach   veth pairs off their bridges, namespace unpinned, files removed  ->  row and addresses gone, journal

What changes one that stands is in corral.network.connections and corral.network.publishing.

Failing anywhere in Attach undoes it all. A daemon that dies in between leaves an ATTACHING row, which the next start
undoes, or a READY one whose kernel objects are gone, which the next Attach makes anew and the next Detach deletes. An
address is free only once nothing can use it any more. Without interfaces there is nothing to undo, and one
transaction does.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import structlog

from corral.network import planning, port_rows, store
from corral.network.allocations import Allocations
from corral.network.connections import (
    Connections,
    Wanted,
    attachments_of,
    differ_in_networks,
    half_connected,
)
from corral.network.files import FileStore
from corral.network.lost import lost_links
from corral.network.model import (
    DEFAULT_NETWORK,
    Attachment,
    Endpoint,
    EndpointKey,
    EndpointState,
    Mode,
    Network,
    Port,
    Request,
)
from corral.network.networks import HOST, NONE, Networks
from corral.network.pool import NetnsPool, is_pinned
from corral.network.publishing import Publishing, alike, meant, missing, refuse_lasting
from corral.network.resolver import Resolvers
from corral.network.standing import Standing
from corral.network.work import Work
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, InvalidArgument, NotFound
from corral.store import Database, Transaction, failpoint

log = structlog.get_logger()


class Endpoints:
    """All endpoints of this engine."""

    def __init__(
        self,
        db: Database,
        networks: Networks,
        pool: NetnsPool,
        files: FileStore,
        held: Allocations,
        publishing: Publishing,
        resolvers: Resolvers,
        standing: Standing,
        *,
        boot_id: str,
        host_prefix: str,
    ) -> None:
        self._db = db
        self._networks = networks
        self._pool = pool
        self._allocations = held
        self._publishing = publishing
        self._resolvers = resolvers
        self._boot_id = boot_id
        self._host_prefix = host_prefix
        self._standing = standing
        self._connections = Connections(db, held, standing, resolvers, host_prefix=host_prefix)
        self.files = files
        self._locks: WeakValueDictionary[EndpointKey, asyncio.Lock] = WeakValueDictionary()
        self._work = Work()
        # What publish() or unpublish() has left last, until something else is done about it: to read the thousand ports
        # that are there for each that comes would be most of its cost.
        self._published: Endpoint | None = None

    # Attaching

    async def attach(self, key: EndpointKey, request: Request) -> Endpoint:
        """Give a container its network; the same call again gives the same answer.

        Raises AlreadyExists if the endpoint exists with another request, NotFound for a network or container,
        InvalidArgument, FailedPrecondition (address taken), ResourceExhausted (no address left).
        """
        attached = await self._alone(key, lambda: self._attach(key, request))
        assert attached is not None
        return attached

    async def _attach(self, key: EndpointKey, request: Request) -> Endpoint:
        existing = self.find(key)
        if existing is not None:
            existing = await self._undo_connects(existing)
            await self._mend(existing)
        if existing is not None and self.stands(existing):
            if not differ_in_networks(existing.request, request) and not alike(existing.request, request):
                raise AlreadyExists(
                    f"endpoint {key.id!r} is attached already, in another way: detach it first",
                    reason="ENDPOINT_EXISTS",
                )
            if existing.request.attachments != request.attachments or existing.mode is not request.mode:
                wanted = await self._wanted(key.namespace, attachments_of(request))
                existing = await self._connections.follow(existing, request, wanted)
            lacking = missing(existing, request.ports)
            return await self._publishing.publish(existing, lacking) if lacking else existing
        if existing is not None and existing.state is not EndpointState.READY:
            await self._detach_silently(existing)
            existing = None
        if existing is not None and not alike(existing.request, request):
            await self._detach(existing)
            existing = None
        if existing is not None:
            await self._standing.discard(existing)  # what may be left of it
        if request.mode is Mode.NETWORKS:
            return await self._attach_networks(key, request, existing)
        endpoint = await self._without_interfaces(key, request)
        try:
            if (endpoint.owner or self.files.is_ready(endpoint.netns)) and not request.sysctls:
                self._standing.make_inside(endpoint)
            else:
                await run_blocking(self._standing.make_inside, endpoint)
            return await self._db.write(lambda transaction: _insert_ready(transaction, endpoint, existing))
        except BaseException:
            await self._standing.discard(endpoint)
            raise

    async def _without_interfaces(self, key: EndpointKey, request: Request) -> Endpoint:
        netns, owner = "", ""
        if request.mode is Mode.NONE:
            netns = await self._take_namespace()
        elif request.mode is Mode.PATH:
            netns = request.netns_path
            if not is_pinned(netns):
                raise NotFound(f"{netns} is not a network namespace", reason="NETNS_NOT_FOUND")
        elif request.mode is Mode.CONTAINER:
            netns, owner = self._join(key, request.container)
        return self._new(key, request, netns, EndpointState.READY, owner)

    def _join(self, key: EndpointKey, container: str) -> tuple[str, str]:
        """Whose namespace and files a joining endpoint has."""
        other = self.find(EndpointKey(key.namespace, container))
        if other is None or other.state is not EndpointState.READY:
            raise NotFound(f"container {container!r} has no network to join", reason="ENDPOINT_NOT_FOUND")
        if other.key == key:
            raise InvalidArgument("a container cannot join its own network", reason="JOINS_ITSELF")
        if not self.stands(other):
            raise FailedPrecondition(f"the network of container {container!r} is down: start it first", reason="NOT_UP")
        return self.netns_path(other), other.owner or other.key.id

    async def _attach_networks(self, key: EndpointKey, request: Request, existing: Endpoint | None) -> Endpoint:
        wanted = await self._wanted(key.namespace, attachments_of(request))
        if existing is not None:
            await self._standing.forget_plugins(existing)
        netns = await self._take_namespace()
        try:
            ports = await self._publishing.hold(key, request.ports)
            endpoint = await self._record(key, request, netns, wanted, existing, ports)
        except BaseException:
            self._publishing.release(key)
            self._pool.give_back(netns)
            raise
        try:
            failpoint("network.attach.after_row")
            endpoint = await self._standing.make(endpoint)
            failpoint("network.attach.before_ready")
            self._resolvers.changed()
            return await self._db.write(lambda transaction: _become_ready(transaction, endpoint))
        except BaseException:
            await self._give_up(endpoint)
            raise

    async def _give_up(self, endpoint: Endpoint) -> None:
        """Undo an Attach that failed; what can't be is undone by the next Attach or Detach, or the next start."""
        try:
            await self._detach_silently(endpoint)
        except (CorralError, OSError) as e:  # what is told is why the Attach failed
            log.warning("network.attach_not_undone", endpoint=endpoint.key.id, error=str(e))

    async def _wanted(self, namespace: str, attachments: Sequence[Attachment]) -> Wanted:
        wanted = []
        for attachment in attachments:
            network = await self._networks.get(namespace, attachment.network or DEFAULT_NETWORK)
            if network.driver in (HOST.driver, NONE.driver):
                raise InvalidArgument(
                    f"network {network.name!r} is a mode of its own: it cannot be combined with networks",
                    reason="BAD_MODE",
                )
            wanted.append((attachment, network))
        return wanted

    async def _record(
        self,
        key: EndpointKey,
        request: Request,
        netns: str,
        wanted: Wanted,
        existing: Endpoint | None,
        ports: Sequence[Port],
    ) -> Endpoint:
        """Write the intent. An existing endpoint, of an earlier boot, keeps its addresses."""
        new = self._new(key, request, netns, EndpointState.ATTACHING)

        def write(transaction: Transaction) -> Endpoint:
            if existing is not None:
                store.update_endpoint(transaction, new)
                port_rows.delete(transaction, key, existing.ports)
            else:
                store.insert_endpoint(transaction, new)
                planning.insert_interfaces(transaction, new, wanted, self._allocations, self._host_prefix)
            port_rows.insert(transaction, key, ports)
            found = store.endpoint(transaction, key)
            assert found is not None
            return found

        return await self._db.write(write)

    def _new(self, key: EndpointKey, request: Request, netns: str, state: EndpointState, owner: str = "") -> Endpoint:
        return Endpoint(key, request, netns, (), state, self._boot_id, time.time_ns(), owner)

    async def _take_namespace(self) -> str:
        ready = self._pool.take()
        return await run_blocking(self._pool.make) if ready is None else ready

    # Changing those that stand

    async def connect(self, key: EndpointKey, attachment: Attachment) -> Endpoint:
        """Put it into one more network, see Connections.connect(). Raises NotFound, FailedPrecondition too."""

        async def work() -> Endpoint:
            endpoint = await self._standing_one(key)
            [(_, network)] = await self._wanted(key.namespace, [attachment])
            return await self._connections.connect(endpoint, attachment, network)

        return await self._alone(key, work)

    async def disconnect(self, key: EndpointKey, network: str) -> Endpoint:
        """Take it out of a network, see Connections.disconnect(). Raises NotFound, FailedPrecondition."""

        async def work() -> Endpoint:
            endpoint = await self._undo_connects(self.get(key))
            self._require_up(endpoint)  # and no more: a network whose parent is gone can be left
            return await self._connections.disconnect(endpoint, await self._networks.get(key.namespace, network))

        return await self._alone(key, work)

    async def _standing_one(self, key: EndpointKey) -> Endpoint:
        return await self._standing_again(self.get(key))

    async def _standing_again(self, found: Endpoint) -> Endpoint:
        endpoint = await self._undo_connects(found)
        self._require_up(endpoint)
        await self._mend(endpoint)
        return endpoint

    def _require_up(self, endpoint: Endpoint) -> None:
        path = self.netns_path(endpoint)
        if endpoint.boot_id != self._boot_id or (path and not is_pinned(path)):
            raise FailedPrecondition(
                f"the network of container {endpoint.key.id[:12]!r} is down: start the container first", reason="NOT_UP"
            )

    async def publish(self, key: EndpointKey, ports: Sequence[Port]) -> Endpoint:
        """Publish more ports; those that are published stay. Raises NotFound, AlreadyExists, InvalidArgument."""

        async def work() -> Endpoint:
            endpoint = await self._standing_again(self._take_published(key) or self.get(key))
            lacking = missing(endpoint, ports)
            self._published = await self._publishing.publish(endpoint, lacking) if lacking else endpoint
            return self._published

        return await self._alone(key, work, keeps_published=True)

    async def unpublish(self, key: EndpointKey, ports: Sequence[Port]) -> Endpoint:
        """Withdraw ports, or all if none is named; no error for what is not published. Raises NotFound."""

        async def work() -> Endpoint:
            endpoint = self._take_published(key) or self.get(key)
            if ports:
                refuse_lasting(endpoint, meant(endpoint, ports))
            self._published = await self._publishing.withdraw(endpoint, meant(endpoint, ports))
            return self._published

        return await self._alone(key, work, keeps_published=True)

    def _take_published(self, key: EndpointKey) -> Endpoint | None:
        if self._published is None or self._published.key != key:
            return None
        found, self._published = self._published, None
        return found

    # Detaching

    async def detach(self, key: EndpointKey, *, must_exist: bool = False) -> None:
        """Take it all back; no error if there is nothing, unless must_exist: NotFound."""

        async def work() -> None:
            existing = self.find(key)
            if existing is not None:
                await self._detach(existing)
            elif must_exist:
                raise NotFound(f"there is no endpoint {key.id!r}", reason="ENDPOINT_NOT_FOUND")

        await self._alone(key, work)

    async def _detach(self, endpoint: Endpoint) -> None:
        await self._standing.take_apart(endpoint)

        def write(transaction: Transaction) -> None:
            self._delete(transaction, endpoint)
            transaction.journal("endpoint.detached", endpoint.key.id, {}, namespace=endpoint.key.namespace)

        await self._db.write(write)
        self._resolvers.changed()

    async def _detach_silently(self, endpoint: Endpoint) -> None:
        """Undo an Attach that nobody was told of."""
        await self._standing.take_apart(endpoint)
        await self._db.write(lambda transaction: self._delete(transaction, endpoint))
        self._resolvers.changed()

    def _delete(self, transaction: Transaction, endpoint: Endpoint) -> None:
        store.delete_endpoint(transaction, endpoint.key)
        for interface in endpoint.interfaces:
            self._allocations.release(interface.addresses)

    async def undo_half(self, key: EndpointKey) -> None:
        """Remove an endpoint whose making was cut short, or what a connect that was has left of it.

        Raises FailedPrecondition with the words of a plugin of CNI.
        """

        async def work() -> None:
            existing = self.find(key)
            if existing is None or not is_half(existing):
                return
            if existing.state is EndpointState.READY:
                await self._undo_connects(existing)
            else:
                await self._detach_silently(existing)

        await self._alone(key, work)

    async def _undo_connects(self, endpoint: Endpoint) -> Endpoint:
        for made in half_connected(endpoint):
            endpoint = await self._connections.take_back(endpoint, made)
        return endpoint

    # Finding

    def dying_links(self) -> Sequence[str]:
        """Links of endpoints that are gone, which the kernel, or we, will delete."""
        return self._standing.dying

    def find(self, key: EndpointKey) -> Endpoint | None:
        """The endpoint as recorded."""
        return self._db.read_sync(lambda snapshot: store.endpoint(snapshot, key))

    def get(self, key: EndpointKey) -> Endpoint:
        """An endpoint that was attached. Raises NotFound."""
        found = self.find(key)
        if found is None or found.state is not EndpointState.READY:
            raise NotFound(f"there is no endpoint {key.id!r}", reason="ENDPOINT_NOT_FOUND")
        return found

    async def list(self, namespace: str | None, network: Network | None) -> Sequence[Endpoint]:
        """Those attached, of one namespace or all, of one network or all."""
        network_id = None if network is None else network.id
        found = await self._db.read(
            lambda snapshot: store.endpoints(snapshot, namespace=namespace, network_id=network_id)
        )
        return [endpoint for endpoint in found if endpoint.state is EndpointState.READY]

    def stands(self, endpoint: Endpoint) -> bool:
        """Whether what the row describes is there: not half made, of this boot, its namespace and its links
        existing."""
        if endpoint.state is not EndpointState.READY or endpoint.boot_id != self._boot_id:
            return False
        path = self.netns_path(endpoint)
        return not path or (is_pinned(path) and not lost_links(endpoint, path))

    async def undisturbed(self, key: EndpointKey, work: Callable[[Endpoint], Awaitable[None]]) -> None:
        """Look at one that stands while nobody changes it; nothing if it does not stand. Raises what `work` raises."""

        async def look() -> None:
            endpoint = self.find(key)
            if endpoint is not None and self.stands(endpoint):
                await work(endpoint)

        await self._alone(key, look)

    async def mend(self, key: EndpointKey) -> None:
        """Make the links again that are missing of one that stands otherwise; no error if it is gone."""

        async def work() -> None:
            if (endpoint := self.find(key)) is not None:
                await self._mend(endpoint)

        await self._alone(key, work)

    async def _mend(self, endpoint: Endpoint) -> None:
        """Make the links that are missing of one that stands otherwise."""
        if endpoint.state is not EndpointState.READY or endpoint.boot_id != self._boot_id or not endpoint.interfaces:
            return
        if not self.stands(endpoint) and is_pinned(self.netns_path(endpoint)):
            await self._standing.mend(endpoint)

    def netns_path(self, endpoint: Endpoint) -> str:
        """Where the namespace can be joined; empty: it is the host's."""
        return f"{self._pool.directory}/{endpoint.netns}" if endpoint.mode.has_own_namespace else endpoint.netns

    def files_directory(self, endpoint: Endpoint) -> str:
        """Where its files are: those of the container it joined, or its own."""
        return self.files.path(endpoint.key.namespace, endpoint.owner or endpoint.key.id)

    # Running

    async def _alone[T: Endpoint | None](
        self, key: EndpointKey, work: Callable[[], Awaitable[T]], *, keeps_published: bool = False
    ) -> T:
        """Run `work` while nobody else works on this endpoint, to its end even if the caller gives up."""

        async def locked() -> T:
            lock = self._locks.setdefault(key, asyncio.Lock())
            async with lock:
                if not keeps_published:
                    self._take_published(key)
                return await work()

        return await self._work.to_the_end(locked())

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._work.close()
        await self._standing.close()
        await self.files.trash.close()


def is_half(endpoint: Endpoint) -> bool:
    """Whether an Attach or a Connect of it is under way, or was cut short. Pure."""
    return endpoint.state is not EndpointState.READY or bool(half_connected(endpoint))


def _insert_ready(transaction: Transaction, endpoint: Endpoint, existing: Endpoint | None) -> Endpoint:
    if existing is not None:  # of an earlier boot
        store.delete_endpoint(transaction, endpoint.key)
    store.insert_endpoint(transaction, endpoint)
    return _journalled(transaction, endpoint)


def _become_ready(transaction: Transaction, endpoint: Endpoint) -> Endpoint:
    ready = replace(endpoint, state=EndpointState.READY)
    store.update_endpoint(transaction, ready)
    return _journalled(transaction, ready)


def _journalled(transaction: Transaction, endpoint: Endpoint) -> Endpoint:
    payload = {
        "mode": endpoint.mode.value,
        "networks": [interface.network.name for interface in endpoint.interfaces],
        "addresses": [str(address) for interface in endpoint.interfaces for address, _ in interface.addresses],
    }
    transaction.journal("endpoint.attached", endpoint.key.id, payload, namespace=endpoint.key.namespace)
    return endpoint
