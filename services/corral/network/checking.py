"""Rows, namespaces, links, rules and files compared while the leaf runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from corral.network import store
from corral.network.cni.attachments import CniAttachments
from corral.network.endpoints import Endpoints, is_half
from corral.network.firewall import Firewall
from corral.network.links import NetlinkThread
from corral.network.model import Endpoint, EndpointKey, Network, NetworkState
from corral.network.networks import Networks
from corral.network.ownership import seclusions
from corral.network.pool import NetnsPool
from corral.network.recovery import Reconciler
from corral.rpc.blocking import run_blocking
from corral.rpc.checking import Found
from corral.rpc.errors import CorralError
from corral.store import Database

if TYPE_CHECKING:
    from corral.network.netlink import Netlink


@dataclass(frozen=True, slots=True)
class Checker:
    """See the module."""

    db: Database
    thread: NetlinkThread
    networks: Networks
    endpoints: Endpoints
    pool: NetnsPool
    firewall: Firewall
    reconciler: Reconciler
    cni: CniAttachments
    boot_id: str

    async def look(self) -> Sequence[Found]:
        """What is on the host is read before the rows: what is being made has its row first, or soon after."""
        found = await run_blocking(self._on_disk)
        found += await run_blocking(self._endpoints)
        found += await self._plugins()
        if self.db.read_sync(store.networks):  # without one no link can be ours, and netlink need not be loaded
            found += await self.thread.run(self._in_kernel)
        return found

    # Namespaces and files

    def _on_disk(self) -> list[Found]:
        pinned, ready = self.pool.pinned()
        keys = self.endpoints.files.found()
        endpoints = self.db.read_sync(store.endpoints)
        used = {endpoint.netns for endpoint in endpoints} | seclusions(self.db.read_sync(store.networks))
        found = [
            Found(
                f"network namespace {self.pool.path(name)}",
                "belongs to no endpoint",
                "repair unpins it",
                partial(self._discard, name),
            )
            for name in sorted(pinned - used - ready)
        ]
        known = {endpoint.key for endpoint in endpoints}
        found += [
            Found(
                f"files of endpoint {key.namespace}/{key.id}",
                "belong to no endpoint",
                "repair removes them",
                partial(self._remove_files, key),
            )
            for key in sorted(keys - known, key=str)
        ]
        return found

    async def _discard(self, name: str) -> None:
        if name not in {endpoint.netns for endpoint in self.db.read_sync(store.endpoints)}:
            await run_blocking(self.pool.discard, name)

    async def _remove_files(self, key: EndpointKey) -> None:
        if self.endpoints.find(key) is None:
            self.endpoints.files.throw(key)

    # Endpoints

    def _endpoints(self) -> list[Found]:
        found = []
        for endpoint in self.db.read_sync(store.endpoints):
            subject = f"endpoint {endpoint.key.namespace}/{endpoint.key.id}"
            if is_half(endpoint):
                repair = partial(self.endpoints.undo_half, endpoint.key)
                found.append(Found(subject, "was never finished", "repair removes it", repair))
            elif endpoint.boot_id == self.boot_id and not self.endpoints.stands(endpoint):
                remedy = "repair attaches it anew; restart its container if that runs"
                found.append(
                    Found(subject, "has lost its namespace or its links", remedy, partial(self._again, endpoint))
                )
        return found

    async def _again(self, endpoint: Endpoint) -> None:
        await self.endpoints.attach(endpoint.key, endpoint.request)

    # What plugins made

    async def _plugins(self) -> list[Found]:
        found: list[Found] = []
        for endpoint in self.db.read_sync(store.endpoints):
            if any(interface.network.is_cni for interface in endpoint.interfaces):
                await self.endpoints.undisturbed(endpoint.key, partial(self._asked, found))
        return found

    async def _asked(self, found: list[Found], endpoint: Endpoint) -> None:
        for interface in endpoint.interfaces:
            if not interface.network.is_cni:
                continue
            try:
                await self.cni.check(endpoint, interface)
            except CorralError as e:
                subject = f"endpoint {endpoint.key.namespace}/{endpoint.key.id}"
                problem = f"is not as plugins made it in network {interface.network.name}: {e}"
                found.append(Found(subject, problem, "remove its container and make it anew", None))

    # Links and rules

    def _in_kernel(self, netlink: "Netlink") -> list[Found]:
        strays = self.reconciler.stray_links(netlink, self.endpoints.dying_links())
        found = [
            Found(f"link {name}", "belongs to no endpoint", "repair deletes it", partial(self._delete_link, name))
            for name in strays
        ]
        networks = self.db.read_sync(store.networks)
        for network in networks:
            subject = f"network {network.namespace}/{network.name}" if network.namespace else f"network {network.name}"
            if network.state is not NetworkState.READY:
                problem = f"was left {network.state}"
                found.append(Found(subject, problem, "repair removes it", partial(self._reconcile, network)))
            elif not self.networks.stands(network):
                what = "bridge" if network.is_bridge else "parent"
                problem = f"has lost its {what} {network.lower}"
                found.append(Found(subject, problem, "repair makes it anew", partial(self._reconcile, network)))
        if any(network.is_bridge for network in networks) and not self.firewall.stands():
            found.append(
                Found(f"nftables table {self.firewall.table}", "is gone", "repair makes it anew", self._rebuild_rules)
            )
        return found

    async def _delete_link(self, name: str) -> None:
        def delete(netlink: "Netlink") -> None:
            if name in self.reconciler.stray_links(netlink, ()):
                netlink.delete_link(name)

        await self.thread.run(delete)

    async def _reconcile(self, network: Network) -> None:
        def reconcile(netlink: "Netlink") -> None:
            now = self.db.read_sync(lambda snapshot: store.network_by_id(snapshot, network.id))
            if now is not None:
                self.reconciler.reconcile(netlink, now)

        await self.thread.run(reconcile)

    async def _rebuild_rules(self) -> None:
        await self.thread.run(lambda _: self.firewall.rebuild())
