"""Endpoints in the kernel and on disk: what a row describes is made, and taken apart again.

Links are made on the netlink thread; where an endpoint has no interfaces a blocking one does, or the loop if nothing
there waits.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from corral.network import etc, sysctls
from corral.network.cni.attachments import CniAttachments
from corral.network.config import NetworkConfig
from corral.network.files import FileStore
from corral.network.links import InterfacePlan, NetlinkThread, link_exists
from corral.network.lost import lost_links
from corral.network.model import Endpoint, Interface
from corral.network.names import has_names
from corral.network.networks import Networks
from corral.network.plans import interface_plans
from corral.network.pool import NetnsPool, is_pinned
from corral.network.publishing import Publishing
from corral.network.reaper import Reaper
from corral.network.resolver import Resolvers
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError
from corral.store import failpoint

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

log = structlog.get_logger()

_NAME_CHARS = 14  # of a link's name, and one more


class Standing:
    """See the module."""

    def __init__(
        self,
        config: NetworkConfig,
        thread: NetlinkThread,
        networks: Networks,
        pool: NetnsPool,
        files: FileStore,
        publishing: Publishing,
        resolvers: Resolvers,
        host_files: etc.HostFiles,
        cni: CniAttachments,
    ) -> None:
        self._config = config
        self._thread = thread
        self._networks = networks
        self._pool = pool
        self._files = files
        self._publishing = publishing
        self._resolvers = resolvers
        self._host_files = host_files
        self._cni = cni
        self._reaper = Reaper(thread)

    @property
    def dying(self) -> Sequence[str]:
        """Links of endpoints that are gone, which the kernel, or we, will delete."""
        return self._reaper.dying

    async def make(self, endpoint: Endpoint) -> Endpoint:
        """Make everything that the row of one with interfaces describes; returns it with what plugins gave it."""
        await self._listen(endpoint)
        made = await self._cni.add(endpoint)
        await self._thread.run(lambda netlink: self._make(netlink, made))
        return made

    async def forget_plugins(self, endpoint: Endpoint) -> None:
        """What plugins made for it in an earlier boot is not there: have them give back its addresses."""
        await self._cni.delete(endpoint, endpoint.interfaces)

    async def _listen(self, endpoint: Endpoint) -> None:
        """See that its networks have their resolvers, which need the bridges."""
        for network in (each.network for each in endpoint.interfaces if has_names(each)):
            if not self._resolvers.stands(network):
                await self._thread.run(lambda netlink, one=network: self._networks.build_missing(netlink, [one]))  # type: ignore[misc]
                await self._resolvers.listen(network)

    def _make(self, netlink: "Netlink", endpoint: Endpoint) -> None:
        self._networks.build_missing(netlink, [interface.network for interface in endpoint.interfaces])
        path = self._pool.path(endpoint.netns)
        plans = interface_plans(endpoint)
        for plan in plans:
            if link_exists(plan.host_name):  # of an earlier life, in a namespace that somebody still holds
                netlink.delete_link(plan.host_name)
            self._plug(netlink, plan, path)
            failpoint("network.attach.after_plug")
        self.make_inside(endpoint)  # sysctls find the interfaces there, and not yet up
        netlink.configure_inside(path, plans)
        if endpoint.ports:
            self._publishing.open(netlink, endpoint, endpoint.ports)

    def _plug(self, netlink: "Netlink", plan: InterfacePlan, path: Path) -> None:
        if plan.sublink is None:
            netlink.plug(plan, path)
        else:
            seclusion = self._pool.path(plan.bridge) if plan.secluded else None
            netlink.plug_sublink(plan, plan.sublink, path, seclusion)

    async def mend(self, endpoint: Endpoint) -> None:
        """Make those of its links that are not there, in the namespace that is. Raises CorralError, OSError."""
        await self._listen(endpoint)
        await self._thread.run(lambda netlink: self.make_missing(netlink, endpoint))

    def make_missing(self, netlink: "Netlink", endpoint: Endpoint) -> None:
        """The same on the netlink thread, without the resolvers."""
        path = self._pool.path(endpoint.netns)
        lost = {interface.name: interface.network for interface in lost_links(endpoint, path)}
        self._networks.build_missing(netlink, lost.values())
        for plan in interface_plans(endpoint):
            if plan.name in lost:
                self._make_again(netlink, endpoint, plan, path)

    def _make_again(self, netlink: "Netlink", endpoint: Endpoint, plan: InterfacePlan, path: Path) -> None:
        """What has its name is whole, also if this process dies here; what has not goes with the next attempt."""
        born = _unfinished(plan)
        self._unplug(netlink, born, path)
        try:
            self._plug(netlink, born, path)
            failpoint("network.connect.after_plug")
            netlink.configure_inside(path, [plan], born.name)
            sysctls.write(path, sysctls.of_link(endpoint.request.sysctls, plan.name))
            if plan.host_name:
                if endpoint.ports:
                    netlink.reflect(born.host_name)
                netlink.rename(born.host_name, plan.host_name)
        except BaseException:
            self._unplug(netlink, born, path)
            raise

    def _unplug(self, netlink: "Netlink", plan: InterfacePlan, path: Path) -> None:
        if plan.host_name:
            netlink.delete_link(plan.host_name)
        else:
            netlink.delete_inside(path, plan.name)

    def _make_more(self, netlink: "Netlink", before: Endpoint, endpoint: Endpoint) -> None:
        names = {interface.name for interface in before.interfaces}
        added = [interface for interface in endpoint.interfaces if interface.name not in names]
        self._networks.build_missing(netlink, [interface.network for interface in added])
        path = self._pool.path(endpoint.netns)
        plans = [plan for plan in interface_plans(endpoint) if plan.name not in names]
        for plan in plans:
            self._plug(netlink, plan, path)
            failpoint("network.connect.after_plug")
        netlink.configure_inside(path, plans)

    async def plug(self, before: Endpoint, endpoint: Endpoint) -> Endpoint:
        """Make the links that it has more than before, and what follows from that; returns it as make() does."""
        await self._listen(endpoint)
        made = await self._cni.add(endpoint)

        def work(netlink: "Netlink") -> None:
            self._make_more(netlink, before, made)
            self._publishing.follow(netlink, before, made)
            self._change_files(before, made)

        await self._thread.run(work)
        return made

    async def set_rates(self, before: Endpoint, endpoint: Endpoint, names: Collection[str]) -> None:
        """Have its interfaces of these names receive and send what they are to, and not what they were; all or none."""
        path = self._pool.path(endpoint.netns)
        old, new = ([plan for plan in interface_plans(one) if plan.name in names] for one in (before, endpoint))

        def work(netlink: "Netlink") -> None:
            with ExitStack() as undo:
                for was, plan in zip(old, new, strict=True):
                    undo.callback(_try_rates, netlink, was, path)
                    netlink.set_rates(plan, path)
                    failpoint("network.rates.after_change")
                undo.pop_all()

        await self._thread.run(work)

    async def unplug(self, before: Endpoint, left: Endpoint, gone: Interface) -> None:
        """Delete one of its links, and do what follows from that; no error if it is gone already."""
        path = self._pool.path(left.netns)
        await self._cni.delete(before, [gone])

        def work(netlink: "Netlink") -> None:
            self._publishing.follow(netlink, before, left)
            if gone.network.is_bridge:
                netlink.delete_link(gone.host_name)
            elif not gone.network.is_cni and is_pinned(path):
                netlink.delete_inside(path, gone.name)
            failpoint("network.disconnect.after_unplug")
            try:
                netlink.reroute_inside(path, interface_plans(left))
            except OSError as e:  # who may administer the network in there has changed it
                log.warning("network.not_rerouted", endpoint=left.key.id, error=str(e))
            for address, _ in gone.addresses:
                self._publishing.conntrack.forget_address(address)  # it may be another's next
            self._change_files(before, left)

        await self._thread.run(work)

    def settle_files(self, before: Endpoint, endpoint: Endpoint) -> None:
        """Have its files tell what it is, after a change that was cut short. Blocks; what fails is told in the log."""
        if endpoint.owner:
            return
        try:
            old, new = (self._texts(one, started=False) for one in (before, endpoint))
            self._files.change(endpoint.key, old, new)
        except (OSError, CorralError) as e:
            log.warning("network.files_not_settled", endpoint=endpoint.key.id, error=str(e))

    def _change_files(self, before: Endpoint, endpoint: Endpoint) -> None:
        old, new = self._texts(before), self._texts(endpoint)
        self._files.change(endpoint.key, old, new)

    def make_inside(self, endpoint: Endpoint) -> None:
        """Its kernel parameters and its files."""
        if endpoint.request.sysctls:  # which only one with a namespace of its own has
            sysctls.write(self._pool.path(endpoint.netns), endpoint.request.sysctls)
        if not endpoint.owner:
            self._files.write(endpoint.key, self._texts(endpoint), ready=endpoint.netns)

    def _texts(self, endpoint: Endpoint, *, started: bool = True) -> etc.EtcFiles:
        own = self._resolver_of(endpoint, started=started)
        return etc.compose(endpoint, self._host_files, self._config.fallback_dns, own)

    def _resolver_of(self, endpoint: Endpoint, *, started: bool) -> str:
        """Where it asks for names; "" if in no network of it anybody answers, or will once resolvers are started."""
        named = (each.network for each in endpoint.interfaces if has_names(each))
        served = (network for network in named if not started or self._resolvers.serves(network))
        return next((str(network.ranges[0].gateway) for network in served), "")

    def _unmake(self, netlink: "Netlink", endpoint: Endpoint) -> None:
        if endpoint.ports:
            self._publishing.shut(endpoint, endpoint.ports)
        path = self._pool.path(endpoint.netns)
        for interface in endpoint.interfaces:
            if interface.network.is_bridge:
                netlink.unplug(interface.host_name)
            elif not interface.network.is_cni and is_pinned(path):  # who still holds it is to lose the address
                netlink.delete_inside(path, interface.name)
            for address, _ in interface.addresses if endpoint.request.ports or endpoint.ports else ():
                self._publishing.conntrack.forget_address(address)  # it may be another's next
        failpoint("network.detach.after_unplug")
        self._pool.discard(endpoint.netns)

    async def take_apart(self, endpoint: Endpoint) -> None:
        """Take everything back that is there of it."""
        if endpoint.interfaces:
            await self._cni.delete(endpoint, endpoint.interfaces)
            await self._thread.run(lambda netlink: self._unmake(netlink, endpoint))
            self._reaper.watch(each.host_name for each in endpoint.interfaces if each.network.is_bridge)
            self._throw_files(endpoint)
        else:
            await self.discard(endpoint)
        failpoint("network.detach.before_delete")

    async def discard(self, endpoint: Endpoint) -> None:
        """The same for one without interfaces, or whose interfaces are gone."""
        if endpoint.mode.has_own_namespace:
            await run_blocking(self._pool.discard, endpoint.netns)
        self._throw_files(endpoint)

    def _throw_files(self, endpoint: Endpoint) -> None:
        if not endpoint.owner:
            self._files.throw(endpoint.key)

    async def close(self) -> None:
        """Wait for what is under way."""
        await self._reaper.close()


def _try_rates(netlink: "Netlink", plan: InterfacePlan, path: Path) -> None:
    with suppress(OSError):  # what is told is why others could not be set
        netlink.set_rates(plan, path)


def _unfinished(plan: InterfacePlan) -> InterfacePlan:
    """The same under the name that it is looked for by only once it is whole. Pure."""
    if plan.host_name:
        return replace(plan, host_name=f"{plan.host_name[:-1]}~")
    return replace(plan, name=f"{plan.name[:_NAME_CHARS]}~")
