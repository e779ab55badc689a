"""What a start finds, and what it does about it.

    row                                      kernel                          done
    endpoint ATTACHING                       anything                        both undone; later, if plugins of
                                                                             CNI may have made something for it
    endpoint READY of an earlier boot        nothing                         kept: Attach makes it anew
    network CREATING, REMOVING               anything                        both removed
    network READY                            bridge or rules missing         made anew, ports put back
    none                                     namespace pinned in our state   unpinned
    none                                     veth of our prefix, on our      deleted
                                             bridge or on none
    none                                     files in our root               removed

Nothing else is looked at. Rows and namespaces are done before the first RPC; links and rules on the netlink thread,
ahead of whatever RPCs ask of it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from corral.network import port_rows, store
from corral.network.cni import rows
from corral.network.connections import half_connected
from corral.network.files import FileStore
from corral.network.firewall import Firewall
from corral.network.links import link_exists
from corral.network.lost import lost_links
from corral.network.model import Endpoint, EndpointState, Interface, Network, NetworkState
from corral.network.network_options import may_talk
from corral.network.networks import Networks
from corral.network.ownership import seclusions
from corral.network.pool import NetnsPool, is_pinned
from corral.network.publishing import Publishing, all_forwards
from corral.rpc.errors import CorralError
from corral.store import Database, Transaction

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

log = structlog.get_logger()

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Differs after every boot."""
    return BOOT_ID.read_text().strip()


def sweep(db: Database, pool: NetnsPool, files: FileStore) -> Sequence[Endpoint]:
    """The part before the first RPC: half made endpoints, namespaces and files that nobody owns. Blocks.

    Returns endpoints that stand but for some of their links, which the other part makes: what an earlier daemon had
    begun to disconnect, or somebody has deleted.
    """
    endpoints = db.read_sync(store.endpoints)
    half = [endpoint for endpoint in endpoints if endpoint.state is EndpointState.ATTACHING]
    ready = [endpoint for endpoint in endpoints if endpoint.state is EndpointState.READY]
    owing = [endpoint for endpoint in half if _owes(db, endpoint, endpoint.interfaces)]
    half = [endpoint for endpoint in half if endpoint not in owing]
    apart = seclusions(db.read_sync(store.networks))
    namespaces = pool.sweep(apart | {endpoint.netns for endpoint in (*ready, *owing)})
    stale_files = files.sweep({endpoint.key for endpoint in ready})
    if half:
        db.write_sync(lambda transaction: _delete_rows(transaction, half))
    halves = [(endpoint, interface) for endpoint in ready for interface in half_connected(endpoint)]
    bridged = [(endpoint, interface) for endpoint, interface in halves if interface.network.is_bridge]
    if bridged:  # what others have is inside, and taken back as in a disconnect
        db.write_sync(lambda transaction: _delete_interfaces(transaction, bridged))
    if any(endpoint.ports for endpoint in ready):
        db.write_sync(lambda transaction: port_rows.forget_other_boots(transaction, boot_id()))
    if half or namespaces or stale_files:
        log.info("network.swept", endpoints=len(half), namespaces=len(namespaces), files=len(stale_files))
    return [endpoint for endpoint in db.read_sync(store.endpoints) if _has_lost_links(endpoint, pool)]


def _owes(db: Database, endpoint: Endpoint, interfaces: Sequence[Interface]) -> bool:
    """Whether plugins of CNI may have made something for one of them, which they have to take back first."""
    return db.read_sync(lambda snapshot: any(rows.begun(snapshot, endpoint.key, one) for one in interfaces))


def _has_lost_links(endpoint: Endpoint, pool: NetnsPool) -> bool:
    if endpoint.state is not EndpointState.READY or endpoint.boot_id != boot_id():
        return False
    path = pool.path(endpoint.netns)
    return bool(endpoint.interfaces) and is_pinned(path) and bool(lost_links(endpoint, path))


def cut_connects(db: Database) -> Sequence[tuple[Endpoint, Endpoint]]:
    """Endpoints that an earlier daemon was about to connect to a network: as it had them, and as they are to be."""
    ready = (endpoint for endpoint in db.read_sync(store.endpoints) if endpoint.state is EndpointState.READY)
    halves = ((endpoint, len(half_connected(endpoint))) for endpoint in ready)
    return [(one, replace(one, interfaces=one.interfaces[:-count])) for one, count in halves if count]


def without_lost_links(endpoint: Endpoint) -> Endpoint:
    """As its files tell of it, should an earlier daemon have begun to disconnect it."""
    there = (each for each in endpoint.interfaces if not each.network.is_bridge or link_exists(each.host_name))
    return replace(endpoint, interfaces=tuple(there))


def _delete_rows(transaction: Transaction, endpoints: list[Endpoint]) -> None:
    for endpoint in endpoints:
        store.delete_endpoint(transaction, endpoint.key)


def _delete_interfaces(transaction: Transaction, rows: Sequence[tuple[Endpoint, Interface]]) -> None:
    for endpoint, interface in rows:
        store.delete_interface(transaction, endpoint.key, interface)


@dataclass(frozen=True, slots=True)
class Reconciler:
    """The part on the netlink thread."""

    db: Database
    networks: Networks
    firewall: Firewall
    publishing: Publishing
    host_prefix: str
    mend: "Callable[[Netlink, Endpoint], None]"
    """Makes the links of an endpoint that are not there."""

    def needed(self) -> bool:
        """Whether there is anything to compare with the kernel. Without networks no link can be ours."""
        return bool(self.db.read_sync(store.networks)) or self.publishing.is_left

    def run(self, netlink: "Netlink", lame: Sequence[Endpoint]) -> None:
        """Make the kernel what the rows say. Failures are logged, and met again by whoever uses the network.

        lame: what sweep() returned. Before anything else is done on this thread.
        """
        self.publishing.inherit(self.db.read_sync(store.endpoints))
        found = self.db.read_sync(store.networks)
        standing = [network for network in found if network.state is NetworkState.READY]
        self.firewall.begin(standing, all_forwards(self.db, boot_id()))
        for network in found:
            try:
                self.reconcile(netlink, network)
            except (OSError, CorralError) as e:
                log.warning("network.not_reconciled", network=network.name, error=str(e))
        self._reconcile_links(netlink, {network.bridge for network in found if network.is_bridge})
        for endpoint in lame:
            try:
                self.mend(netlink, endpoint)
                log.info("network.links_made", endpoint=endpoint.key.id)
            except (OSError, CorralError) as e:
                log.warning("network.links_not_made", endpoint=endpoint.key.id, error=str(e))
        self.publishing.restore(netlink, self.db.read_sync(store.endpoints))

    def restore_bridges(self, netlink: "Netlink", bridges: Sequence[Network]) -> Collection[str]:
        """Make bridges again, or mend them, with what was plugged into them; returns those that cannot be now."""
        # A removal that has begun meanwhile has its turn on this thread after this.
        ready = {network.id for network in self.db.read_sync(store.networks) if network.state is NetworkState.READY}
        failed = set()
        for network in bridges:
            try:
                if network.id in ready:
                    self.networks.build_anew(netlink, network)
            except (OSError, CorralError) as e:
                failed.add(network.bridge)
                log.warning("network.not_restored", network=network.name, error=str(e))
        if bridges:
            self._reconcile_links(netlink, {network.bridge for network in bridges})
            self.publishing.restore(netlink, self.db.read_sync(store.endpoints))
        return failed

    def reconcile(self, netlink: "Netlink", network: Network) -> None:
        """Make one network whole, or finish its removal. Raises OSError."""
        if network.state is NetworkState.READY:
            self.networks.build_missing(netlink, [network])
            return
        self.networks.driver_of(network).remove(netlink, network)
        self.db.write_sync(lambda transaction: _finish_removal(transaction, network))
        log.info("network.undone", network=network.name, state=network.state)

    def stray_links(self, netlink: "Netlink", dying: Collection[str]) -> list[str]:
        """Ours that no endpoint has, on a bridge of ours or on none; but for those that are going anyway."""
        links = [link for link in netlink.links("veth") if link[0].startswith(self.host_prefix)]
        # Read after the links: an Attach meanwhile has its row before its link.
        endpoints = self.db.read_sync(store.endpoints)
        bridges = {network.bridge for network in self.db.read_sync(store.networks) if network.is_bridge}
        owned = {interface.host_name for endpoint in endpoints for interface in endpoint.interfaces}
        return [name for name, master in links if name not in owned and name not in dying and master in (*bridges, "")]

    def _reconcile_links(self, netlink: "Netlink", bridges: set[str]) -> None:
        links = [link for link in netlink.links("veth") if link[0].startswith(self.host_prefix)]
        # Read after the links: an Attach meanwhile has its row before its link.
        endpoints = self.db.read_sync(store.endpoints)
        owned = {interface.host_name: interface for endpoint in endpoints for interface in endpoint.interfaces}
        orphans = []
        for name, master in links:
            interface = owned.get(name)
            try:
                if interface is None and (master in bridges or not master):
                    netlink.delete_link(name)
                    orphans.append(name)
                elif interface is not None and not master:
                    _put_back(netlink, interface)
            except OSError as e:  # a bridge that could not be made, say
                log.warning("network.link_not_reconciled", link=name, error=str(e))
        if orphans:
            log.info("network.links_removed", links=orphans)


def _put_back(netlink: "Netlink", interface: Interface) -> None:
    netlink.enslave(interface.host_name, interface.network.bridge)
    if not may_talk(interface.network):
        netlink.isolate(interface.host_name)


def _finish_removal(transaction: Transaction, network: Network) -> None:
    store.delete_network(transaction, network.id)
    if network.state is NetworkState.REMOVING:
        transaction.journal("network.removed", network.name, {"id": network.id}, namespace=network.namespace)
