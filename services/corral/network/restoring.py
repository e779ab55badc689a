"""What others deleted of ours is made again, soon after (see corral.network.watching for how that is known).

    rules                 the whole table, from what it is known to hold, in one transaction
    FORWARD of iptables   our rule at its end, where it drops by its policy now, and only there; that of the old one
                          is looked at every ten seconds
    bridge, its address   the bridge, its ports and addresses; its resolver listens anew
    host's end of a pair  the pair, in the namespace that is still there

Rows decide: what is being removed by ourselves has none by then, or says so. A change waits a moment for others that
come with it, and for a while after the last time, so that whoever deletes on and on costs little. What cannot be made
now, because a stranger has its name, say, is tried again later, ever more seldom, and keeps nothing else from being
made.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from corral.network import store
from corral.network.endpoints import Endpoints
from corral.network.links import NetlinkThread, link_exists
from corral.network.model import EndpointKey, Network, NetworkState
from corral.network.names import has_names
from corral.network.networks import Networks
from corral.network.recovery import Reconciler
from corral.network.resolver import Resolvers
from corral.network.watching import NOTHING, Lost
from corral.rpc.errors import CorralError
from corral.store import Database, Snapshot

if TYPE_CHECKING:
    from corral.network.netlink import Netlink

log = structlog.get_logger()

GATHER_S = 0.1
PAUSE_S = 0.5
RETRY_S, LONGEST_RETRY_S = 5.0, 600.0
# How often it is looked at what nobody tells us of: by which links packets leave this host, and the old iptables.
LOOK_S = 10.0


class Restoring:
    """See the module. For the event loop."""

    def __init__(
        self,
        db: Database,
        thread: NetlinkThread,
        networks: Networks,
        endpoints: Endpoints,
        resolvers: Resolvers,
        reconciler: Reconciler,
    ) -> None:
        self._db = db
        self._thread = thread
        self._networks = networks
        self._endpoints = endpoints
        self._resolvers = resolvers
        self._reconciler = reconciler
        self._lost = NOTHING
        self._failed = NOTHING
        self._retry: asyncio.TimerHandle | None = None
        self._delay_s = RETRY_S
        self._told = ""
        self._looking: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def on_lost(self, lost: Lost) -> None:
        """Somebody deleted something that may be ours."""
        self._lost |= lost
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    def on_not_admitted(self) -> None:
        """What FORWARD should hold of ours, or should not, could not be seen to."""
        self._try_later(Lost(forward=True))

    def look_now_and_then(self) -> None:
        """From now on, until close()."""
        self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._thread.run(lambda _: self._look_at_host())
            except (OSError, CorralError) as e:
                self._warn(e)

    def _look_at_host(self) -> None:
        self._reconciler.firewall.admit_legacy()
        self._reconciler.firewall.follow_uplinks()

    def _warn(self, error: Exception) -> None:
        """Once for what happens again and again."""
        if str(error) != self._told:
            log.warning("network.not_restored", error=str(error))
        self._told = str(error)

    async def close(self) -> None:
        """Leave off, but finish what is under way."""
        self._lost = NOTHING
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
        if self._task is not None:
            await asyncio.wait((self._task,))
        if self._retry is not None:
            self._retry.cancel()

    async def _work(self) -> None:
        while self._lost:
            await asyncio.sleep(GATHER_S)
            lost, self._lost = self._lost, NOTHING
            try:
                if await self._restore(lost):
                    await asyncio.sleep(PAUSE_S)
            except (OSError, CorralError) as e:
                self._warn(e)
                self._try_later(lost)
            if not self._failed:
                self._delay_s, self._told = RETRY_S, ""

    def _try_later(self, failed: Lost) -> None:
        self._failed |= failed
        if self._failed and self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(self._delay_s, self._try_again)
            self._delay_s = min(2 * self._delay_s, LONGEST_RETRY_S)

    def _try_again(self) -> None:
        self._retry = None
        failed, self._failed = self._failed, NOTHING
        self.on_lost(failed)

    async def _restore(self, lost: Lost) -> bool:
        """Returns whether anything was missing."""
        standing = [one for one in self._db.read_sync(store.networks) if self._stood(one)]
        bridges = [one for one in standing if lost.unknown or one.bridge in lost.links]
        if lost.rules or lost.forward or bridges or (lost.unknown and standing):
            failed = await self._thread.run(lambda netlink: self._mend_host(netlink, lost, bridges))
            self._try_later(failed)
            await self._listen([one for one in bridges if one.bridge not in failed.links])
        ends = await self._mend_pairs(lost, [one.bridge for one in standing])
        if lost.rules or bridges:
            log.info("network.restored", rules=lost.rules, bridges=[one.bridge for one in bridges])
        return bool(lost.rules or lost.forward or bridges or ends)

    def _stood(self, network: Network) -> bool:
        return network.is_bridge and network.state is NetworkState.READY and self._networks.is_built(network)

    def _mend_host(self, netlink: "Netlink", lost: Lost, bridges: Sequence[Network]) -> Lost:
        """Returns what could not be done."""
        if lost.rules or lost.unknown:
            self._reconciler.firewall.rebuild()
        admitted = not (lost.forward or lost.unknown) or self._reconciler.firewall.admit()
        return Lost(forward=not admitted, links=frozenset(self._reconciler.restore_bridges(netlink, bridges)))

    async def _listen(self, bridges: Sequence[Network]) -> None:
        """Resolvers are bound to the bridge that is gone."""
        gone = {one.id for one in bridges}
        for network_id in gone:
            self._resolvers.stop(network_id)
        for endpoint in self._db.read_sync(store.endpoints) if gone else ():
            for interface in filter(has_names, endpoint.interfaces):
                if interface.network.id in gone:
                    await self._resolvers.listen(interface.network)

    async def _mend_pairs(self, lost: Lost, bridges: Sequence[str]) -> int:
        """Pairs whose host's end is gone; returns of how many endpoints."""
        names = lost.links - set(bridges)
        if lost.unknown:
            endpoints = await self._db.read(store.endpoints)
            names |= {each.host_name for endpoint in endpoints for each in endpoint.interfaces}
        gone = [name for name in names if not link_exists(name)]
        owners = {name: key for name in gone if (key := self._db.read_sync(_owner_of(name))) is not None}
        for name, key in owners.items():
            try:
                await self._endpoints.mend(key)
            except (OSError, CorralError) as e:
                log.warning("network.links_not_made", endpoint=key.id, error=str(e))
                self._try_later(Lost(links=frozenset((name,))))
        return len(owners)


def _owner_of(host_name: str) -> Callable[[Snapshot], EndpointKey | None]:
    return lambda snapshot: store.endpoint_of_link(snapshot, host_name)
