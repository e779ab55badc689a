"""Publishing ports of endpoints: held, recorded, let through, served at ::1; and withdrawn in the reverse order.

After a crash the table is built from the rows (see corral.network.recovery), and restore() holds what they name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from corral.network import port_rows, store
from corral.network.cni.driver import maps_ports
from corral.network.conntrack import Conntrack
from corral.network.firewall import Firewall, route_loopback_to
from corral.network.links import NetlinkThread, link_exists
from corral.network.model import Endpoint, EndpointKey, EndpointState, Forward, Interface, Port, Request
from corral.network.ports import HostPorts, check_reachable, forwards, proxy_target
from corral.network.proxy import wire
from corral.network.proxying import Proxying
from corral.rpc.errors import CorralError, FailedPrecondition
from corral.store import Database, Transaction, failpoint

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

log = structlog.get_logger()


def all_forwards(db: Database, boot_id: str) -> list[Forward]:
    """Where every port that is published leads."""
    endpoints = db.read_sync(store.endpoints)
    return [
        forward
        for endpoint in endpoints
        if endpoint.ports and endpoint.boot_id == boot_id and endpoint.state is EndpointState.READY
        for forward in forwards(endpoint, endpoint.ports)
    ]


def alike(one: Request, other: Request) -> bool:
    """Whether they ask for the same, but for what can change later: ports, and names. Pure."""
    return one == other or _lasting(one) == _lasting(other)


def _lasting(request: Request) -> Request:
    attachments = tuple(replace(attachment, aliases=()) for attachment in request.attachments)
    return replace(request, ports=(), attachments=attachments)


def missing(endpoint: Endpoint, asked: Iterable[Port]) -> list[Port]:
    """Those that are asked for and not published. Pure."""
    return [port for port in asked if not _named(endpoint, port)]


def meant(endpoint: Endpoint, named: Sequence[Port]) -> list[Port]:
    """Those that are published and named; none named means all. Pure."""
    if not named:
        return list(endpoint.ports)
    return list(dict.fromkeys(one for port in named for one in _named(endpoint, port)))


def _named(endpoint: Endpoint, asked: Port) -> list[Port]:
    """Of a container with a thousand ports, these are found without a look at all of what each is."""
    inside = asked.container_port
    return [
        one
        for one in endpoint.ports
        if one.container_port == inside
        and asked.allows(one.host_port)
        and (one.protocol, one.host_ip) == (asked.protocol, asked.host_ip)
    ]


class Publishing:
    """See the module. Callers hold the endpoint's lock."""

    def __init__(self, db: Database, thread: NetlinkThread, firewall: Firewall, proxying: Proxying) -> None:
        self._db = db
        self._thread = thread
        self._firewall = firewall
        self._proxying = proxying
        self._host = HostPorts()
        self.conntrack = Conntrack()

    @property
    def is_left(self) -> bool:
        """Whether a proxy may have ports that an earlier service published."""
        return self._proxying.is_left

    async def hold(self, key: EndpointKey, asked: Sequence[Port]) -> Sequence[Port]:
        """Take ports of the host for an endpoint; returns them with their numbers. Raises AlreadyExists and others."""
        if not asked:
            return ()
        self._db.read_sync(lambda snapshot: port_rows.check(snapshot, key, asked))  # whose message names the other
        ranges = [port for port in asked if port.last_host_port]
        free = (
            self._db.read_sync(lambda snapshot: {port: port_rows.without_taken(snapshot, port) for port in ranges})
            if ranges
            else {}
        )
        return await self._thread.run(lambda _: self._host.hold(key, asked, free))

    def release(self, key: EndpointKey, ports: Iterable[Port] | None = None) -> None:
        """Let the host's programs have them."""
        self._host.release(key, ports)

    def open(self, netlink: "Netlink", endpoint: Endpoint, ports: Sequence[Port]) -> None:
        """Let recorded ports lead to an endpoint that stands. On the netlink thread. Raises InvalidArgument."""
        check_reachable(endpoint, ports)
        for interface in endpoint.interfaces:
            _let_through(netlink, interface)
        failpoint("network.publish.before_rules")
        leading = forwards(endpoint, ports)
        self._firewall.publish(leading)
        self.conntrack.forget_strays(leading, netlink.own_addresses)
        self._proxy(endpoint, ports)
        failpoint("network.publish.after_proxy")

    def _proxy(self, endpoint: Endpoint, ports: Iterable[Port]) -> None:
        """Serve them at ::1, where they are for that and lead anywhere."""
        serving, unserved = [], []
        for port in ports:
            held, target = self._host.held(endpoint.key, port), proxy_target(endpoint, port)
            if held is None or held.loopback is None:
                continue
            if target is None:
                unserved.append(_proxy_key(port))
            else:
                serving.append(wire.Port(_proxy_key(port), target, held.sockets))
        self._proxying.serve(serving)
        self._proxying.drop(unserved)

    def shut(self, endpoint: Endpoint, ports: Sequence[Port]) -> None:
        """Let them lead nowhere, and go. On the netlink thread."""
        leading = forwards(endpoint, ports)
        try:
            self._firewall.withdraw(leading)
            self.conntrack.forget_ways(leading)
        finally:
            self._proxying.drop([_proxy_key(port) for port in ports])
            self._host.release(endpoint.key, ports)

    def follow(self, netlink: "Netlink", before: Endpoint, endpoint: Endpoint) -> None:
        """Let its ports lead to the addresses that it has now. On the netlink thread."""
        old, new = forwards(before, endpoint.ports), forwards(endpoint, endpoint.ports)
        gone = [forward for forward in old if forward not in new]
        if gone:
            self._firewall.withdraw(gone)
            self.conntrack.forget_ways(gone)
        if new != old:
            self.open(netlink, endpoint, endpoint.ports)
        else:  # some are for ::1 alone
            self._proxy(endpoint, endpoint.ports)

    async def publish(self, endpoint: Endpoint, asked: Sequence[Port]) -> Endpoint:
        """More ports of an endpoint that stands; all or none."""
        check_reachable(endpoint, asked)
        refuse_lasting(endpoint, asked)
        self._db.read_sync(lambda snapshot: port_rows.check_own(snapshot, endpoint.key, asked))
        ports = await self.hold(endpoint.key, asked)
        try:
            published = await self._db.write(lambda transaction: _insert(transaction, endpoint, ports))
            failpoint("network.publish.after_rows")
            await self._thread.run(lambda netlink: self.open(netlink, published, ports))
        except BaseException:
            await self._take_back(endpoint, ports)
            raise
        return published

    async def _take_back(self, endpoint: Endpoint, ports: Sequence[Port]) -> None:
        try:
            await self._thread.run(lambda _: self.shut(endpoint, ports))
        except OSError as e:  # what is told is why they could not be published
            log.warning("network.ports_not_shut", endpoint=endpoint.key.id, error=str(e))
        finally:
            await self._db.write(lambda transaction: port_rows.delete(transaction, endpoint.key, ports))

    async def withdraw(self, endpoint: Endpoint, ports: Sequence[Port]) -> Endpoint:
        """These are its ports no more; but for those that plugins of CNI publish, which last as long as it does."""
        ports = [port for port in ports if not _lasts(endpoint, port)]
        if ports:
            await self._thread.run(lambda _: self.shut(endpoint, ports))
            failpoint("network.withdraw.after_rules")
        return await self._db.write(lambda transaction: _delete(transaction, endpoint, ports))

    def restore(self, netlink: "Netlink", endpoints: Iterable[Endpoint]) -> None:
        """Hold what rows say is published. On the netlink thread. What another program has by now is but reported."""
        for endpoint in endpoints:
            for interface in endpoint.interfaces if endpoint.ports else ():
                _let_through(netlink, interface)
            lost = [port for port in endpoint.ports if self._host.held(endpoint.key, port) is None]
            for port in lost:
                try:
                    self._host.hold(endpoint.key, [port])
                except (CorralError, OSError) as e:
                    log.warning("network.port_not_held", endpoint=endpoint.key.id, port=str(port), error=str(e))
            if endpoint.state is EndpointState.READY:
                self._proxy(endpoint, endpoint.ports)

    def inherit(self, endpoints: Iterable[Endpoint]) -> None:
        """Hold what the proxy has kept of that, and have it keep no more. On the netlink thread, first of all."""
        found = {port.key: port for port in self._proxying.find()}
        for endpoint in endpoints:
            for port in endpoint.ports:
                kept = found.get(_proxy_key(port))
                if kept is not None and kept.sockets:
                    self._host.inherit(endpoint.key, port, kept.sockets)
                    del found[_proxy_key(port)]
        self._proxying.drop(found)
        for kept in found.values():
            for each in kept.sockets:
                each.close()

    def close(self) -> None:
        """Let go of all sockets."""
        self._proxying.close()
        self._host.close()
        self.conntrack.close()


def _proxy_key(port: Port) -> wire.Key:
    return port.protocol, port.host_ip, port.host_port


def _lasts(endpoint: Endpoint, port: Port) -> bool:
    """Whether a port is published by a plugin of CNI, which does so once and for all."""
    return not forwards(endpoint, [port]) and any(maps_ports(each.network) for each in endpoint.interfaces)


def refuse_lasting(endpoint: Endpoint, asked: Iterable[Port]) -> None:
    """Raises FailedPrecondition for ports that plugins of CNI publish, or would."""
    for port in asked:
        if _lasts(endpoint, port):
            raise FailedPrecondition(
                f"port {port.container_port}/{port.protocol} is for a CNI plugin, which publishes ports only when a"
                " container is made: make it anew",
                reason="PORT_LASTS",
            )


def _let_through(netlink: "Netlink", interface: Interface) -> None:
    """See that callers from the container itself and from the host's loopback get to its ports."""
    if not interface.network.is_bridge:
        return
    netlink.reflect(interface.host_name)
    if not interface.network.internal and link_exists(interface.network.bridge):
        route_loopback_to(interface.network.bridge)


def _insert(transaction: Transaction, endpoint: Endpoint, ports: Sequence[Port]) -> Endpoint:
    port_rows.insert(transaction, endpoint.key, ports)
    payload = {"ports": [f"{port}->{port.container_port}" for port in ports]}
    transaction.journal("endpoint.published", endpoint.key.id, payload, namespace=endpoint.key.namespace)
    return replace(endpoint, ports=port_rows.joined(endpoint.ports, ports))


def _delete(transaction: Transaction, endpoint: Endpoint, ports: Sequence[Port]) -> Endpoint:
    gone, numbers = frozenset(ports), {port.host_port for port in ports}
    if gone:
        port_rows.delete(transaction, endpoint.key, ports)
        payload = {"ports": [f"{port}->{port.container_port}" for port in ports]}
        transaction.journal("endpoint.withdrawn", endpoint.key.id, payload, namespace=endpoint.key.namespace)
    return replace(
        endpoint, ports=tuple(port for port in endpoint.ports if port.host_port not in numbers or port not in gone)
    )
