"""The parts of the leaf put together: opened when the service starts, closed when it stops."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence

import structlog

from corral.network import admission, etc, explaining, facts, recovery, store, subnets
from corral.network.allocations import Allocations
from corral.network.bridge import BridgeDriver
from corral.network.checking import Checker
from corral.network.cni.attachments import CniAttachments
from corral.network.cni.driver import CniDriver
from corral.network.cni.sharing import SharedNames
from corral.network.config import NetworkConfig
from corral.network.endpoints import Endpoints, is_half
from corral.network.files import FileStore
from corral.network.firewall import Firewall
from corral.network.ipam import Address
from corral.network.links import NetlinkThread
from corral.network.model import Endpoint, EndpointKey, Network, NetworkState
from corral.network.names import Names, has_names
from corral.network.networks import Networks
from corral.network.ownership import PREFIX
from corral.network.pool import NetnsPool
from corral.network.proxying import Proxying
from corral.network.publishing import Publishing
from corral.network.resolver import Resolvers
from corral.network.restoring import Restoring
from corral.network.standing import Standing
from corral.network.store import MIGRATIONS
from corral.network.sublinks import IPVLAN, MACVLAN, SubLinkDriver
from corral.network.watching import Watch
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, FailedPrecondition, InvalidArgument
from corral.store import Database

log = structlog.get_logger()

DATABASE = "network.db"
TAG_CHARS = 4
# Opening netlink takes 0.1 s of CPU, for imports: not while the daemon starts, and before the first container wants it.
WARM_AFTER_S = 0.2
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 600.0


def host_prefix(config: NetworkConfig) -> str:
    """How the host's ends of this engine's veth pairs begin: engines with different roots tell theirs apart by it."""
    return PREFIX + hashlib.sha256(os.fsencode(config.root.resolve())).hexdigest()[:TAG_CHARS]


class Leaf:
    """Everything that lives from start() to stop()."""

    def __init__(self, config: NetworkConfig) -> None:
        """Open the store. Raises OSError, and InvalidArgument for settings that cannot be."""
        subnets.check_interface_name(config.bridge)
        for text in (config.subnet, *config.pools):
            subnets.check_usable(subnets.parse_subnet(text, "subnet or pool in [network] of the configuration"))
        netns = config.state / "netns"
        for directory in (config.root, config.root / "endpoints", netns):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.db = Database(config.root / DATABASE, MIGRATIONS, durable=False, on_loop=True)
        self._thread = NetlinkThread()
        boot_id = recovery.boot_id()
        self._firewall = Firewall(config.nft_table, _forward(config.forward))
        self._proxying = Proxying(config.state, self._thread)
        self._publishing = Publishing(self.db, self._thread, self._firewall, self._proxying)
        host_files = etc.HostFiles(config.resolv_conf, config.resolved_conf)
        self._resolvers = Resolvers(
            lambda: Names(self.db.read_sync(store.endpoints)),
            lambda endpoint: etc.upstream(endpoint, host_files, config.fallback_dns),
        )
        files = FileStore(config.root / "endpoints")
        self._pool = NetnsPool(netns, config.netns_pool_size, files)
        names = SharedNames(config.cni_names, config.root)
        drivers = (
            BridgeDriver(self._firewall),
            SubLinkDriver(MACVLAN, self._pool),
            SubLinkDriver(IPVLAN, self._pool),
            CniDriver(config.cni_bin_dirs, config.cni_conf_dirs, names),
        )
        self._cni = CniAttachments(self.db, config.cni_bin_dirs, config.cni_conf_dirs, self._pool.path, names)
        held, prefix = Allocations(), host_prefix(config)
        self.networks = Networks(config, self.db, self._thread, drivers, held, self._resolvers.stop)
        standing = self._standing = Standing(
            config,
            self._thread,
            self.networks,
            self._pool,
            files,
            self._publishing,
            self._resolvers,
            host_files,
            self._cni,
        )
        self.endpoints = Endpoints(
            self.db,
            self.networks,
            self._pool,
            files,
            held,
            self._publishing,
            self._resolvers,
            standing,
            boot_id=boot_id,
            host_prefix=prefix,
        )
        self._reconciler = recovery.Reconciler(
            self.db, self.networks, self._firewall, self._publishing, prefix, standing.make_missing
        )
        self.checker = Checker(
            self.db,
            self._thread,
            self.networks,
            self.endpoints,
            self._pool,
            self._firewall,
            self._reconciler,
            self._cni,
            recovery.boot_id(),
        )
        self._restoring = Restoring(
            self.db, self._thread, self.networks, self.endpoints, self._resolvers, self._reconciler
        )
        self._watch = Watch(config.nft_table, self._restoring.on_lost)
        self._reconciling: asyncio.Future[None] | None = None
        self._undoing: asyncio.Future[None] | None = None
        self._warming: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Undo what is half done, and begin to compare rows with the kernel in the background."""
        cut = recovery.cut_connects(self.db)
        lame = await run_blocking(recovery.sweep, self.db, self._pool, self.endpoints.files)
        for before, endpoint in (*cut, *((recovery.without_lost_links(one), one) for one in lame)):
            await run_blocking(self._standing.settle_files, before, endpoint)
        self._pool.start()
        loop = asyncio.get_running_loop()
        self._firewall.on_not_admitted = lambda: _tell(loop, self._restoring.on_not_admitted)
        self._start_watch()
        self._proxying.follow()
        self._warming = asyncio.get_running_loop().call_later(WARM_AFTER_S, self._thread.warm)
        if self._reconciler.needed():
            self._reconciling = asyncio.ensure_future(self._reconcile(lame))
            self._reconciling.add_done_callback(_log_failure)
        if self._halves():
            self._undoing = asyncio.ensure_future(self._undo_halves())
            self._undoing.add_done_callback(_log_failure)

    async def _undo_halves(self) -> None:
        """Have plugins of CNI take back what an earlier daemon had begun; again, later, where they refuse."""
        delay_s = FIRST_RETRY_S
        while True:
            for key in self._halves():
                try:
                    await self.endpoints.undo_half(key)
                except (CorralError, OSError) as e:
                    log.warning("network.cni_not_undone", endpoint=key.id, error=str(e))
            if not self._halves():
                return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)

    def _halves(self) -> list[EndpointKey]:
        return [one.key for one in self.db.read_sync(store.endpoints) if is_half(one)]

    async def _collect(self) -> None:
        await self._cni.collect([one for one in self._ready_networks() if one.is_cni])

    def _start_watch(self) -> None:
        try:
            self._watch.start()
        except OSError as e:  # a kernel without nftables, say
            log.warning("network.not_watched", error=str(e))
        self._restoring.look_now_and_then()

    def _ready_networks(self) -> Sequence[Network]:
        return [one for one in self.db.read_sync(store.networks) if one.state is NetworkState.READY]

    async def _reconcile(self, lame: Sequence[Endpoint]) -> None:
        await self._thread.run(lambda netlink: self._reconciler.run(netlink, lame))
        for endpoint in self.db.read_sync(store.endpoints):
            for interface in filter(has_names, endpoint.interfaces):
                await self._resolvers.listen(interface.network)
        await self._collect()  # plugins may take their time

    async def explain(self, key: EndpointKey, destination: Address) -> Sequence[explaining.Step]:
        """Why a packet of a live endpoint would reach a destination or not. Raises NotFound, FailedPrecondition."""
        endpoint = self.endpoints.get(key)
        if not endpoint.mode.has_own_namespace or not self.endpoints.stands(endpoint):
            raise FailedPrecondition(
                f"container {key.id[:12]} has no network of its own that is up: there is nothing to explain",
                reason="NOT_UP",
            )
        path = self._pool.path(endpoint.netns)
        rules = await facts.ruleset()
        found = await self._thread.run(
            lambda netlink: facts.gather(netlink, self._firewall, rules, endpoint, path, destination)
        )
        return explaining.explain(endpoint, destination, found, self._ready_networks())

    async def close(self) -> None:
        """Finish what is under way and end threads and files. Containers keep their network."""
        if self._warming is not None:
            self._warming.cancel()
        self._watch.close()
        if self._undoing is not None:
            self._undoing.cancel()
        await self._restoring.close()
        await self.networks.close()
        await self.endpoints.close()
        if self._reconciling is not None:
            await asyncio.wait((self._reconciling,))
        self._resolvers.close()
        self._proxying.leave()
        await run_blocking(self._close)

    def _close(self) -> None:
        self._pool.close()
        self._thread.close()
        self._publishing.close()
        self._firewall.close()
        self.db.close()


def _forward(setting: str) -> str:
    if setting not in (admission.ACCEPT, admission.LEAVE):
        raise InvalidArgument(
            f"forward = {setting!r} in [network] of the configuration: use {admission.ACCEPT!r} or {admission.LEAVE!r}",
            reason="BAD_SETTING",
        )
    return setting


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    """From any thread."""
    with contextlib.suppress(RuntimeError):  # it has ended
        loop.call_soon_threadsafe(what)


def _log_failure(done: "asyncio.Future[None]") -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.error("network.reconcile_failed", exc_info=error)
