"""Collection: what nothing refers to goes.

One graph, whose arrows say what keeps what:

    image name ---+--> target (manifest or index) --> manifests of an index --> config, layer blobs       (blob_edges)
    lease --------+
    pin ----------+
                  +--> layer --> layer below                                                       (snapshots.parent)
    container --> active tree, view ---+
    committed by name -----------------+
    layer blob that is not kept -------+                                                              (recipes.tree)

Roots are on the left. A name keeps its target, the manifest chosen from that, and the uppermost layer (its chain id)
in the driver that new trees are made with; layers of another driver are kept only by what lies on them. A lease keeps
what was made under it: blobs, layers, trees. A pin is a lease in memory, of a pull, a push or an unpacking that is
under way: it ends with the process, and so does whatever it was for. A container keeps the tree that has its id as key;
it does not keep the name of its image, which can be taken away by force. A blob that was just written has a time of
grace, and so has a part of one (corral.images.partials), in which it counts as kept.

Names themselves go when somebody takes them away, when `prune` finds them unused, or when the disk is above its high
mark (corral.images.reclaiming). An image is unused when no active tree or view was made from it, and neither a lease
nor a pin is on any of its documents or layers (corral.images.disuse).

What is in reach is one recursive query for blobs and one for layers (corral.images.reach). Rows go first, in one
transaction; files after them, so that a crash in between leaves files without a row, which the next start removes.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import structlog

from corral.images import leases, reach
from corral.images.content import ContentStore
from corral.images.digest import Digest
from corral.images.partials import Partials
from corral.images.snapshotter import TreeId
from corral.images.store import SHARED, write_much
from corral.images.tending import Tending
from corral.rpc.blocking import run_blocking
from corral.store import Database, Transaction, failpoint

MAX_NS = (1 << 63) - 1

log = structlog.get_logger()


@dataclass(slots=True)
class Collected:
    """What went."""

    names: list[str] = field(default_factory=list)
    reclaimed_bytes: int = 0
    blobs: list[Digest] = field(default_factory=list)
    trees: list[TreeId] = field(default_factory=list)


class Collector:
    """Runs when asked, and by itself when a lease ends."""

    def __init__(
        self, database: Database, content: ContentStore, partials: Partials, tending: Tending, driver: str
    ) -> None:
        """driver: the one new trees are made with."""
        self._database = database
        self._content = content
        self._partials = partials
        self._tending = tending
        self._driver = driver
        self._pins: Counter[str] = Counter()
        # Held while files and rows of content change together; what it covers takes milliseconds.
        self.changing = asyncio.Lock()
        # Called when content or layers were added.
        self.on_growth: Callable[[], None] = lambda: None
        self._ending: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def pinned(self, names: Iterable[str]) -> AsyncIterator[None]:
        """Keep blobs and layers, which somebody at work counts on, whatever else becomes of them.

        What is here within the block stays: a collection that had not heard of the names is over when it begins.
        """
        names = list(names)
        async with self.changing:
            self._pins.update(names)
        try:
            yield
        finally:
            self._pins.subtract(names)
            self._pins = +self._pins

    @contextlib.contextmanager
    def using(self, names: Iterable[str]) -> Iterator[None]:
        """As pinned(), without a wait, and only against the removal of unused images: for the making of a container."""
        names = list(names)
        self._pins.update(names)
        try:
            yield
        finally:
            self._pins.subtract(names)
            self._pins = +self._pins

    def is_pinned(self, name: str) -> bool:
        """Whether somebody at work counts on it. From any thread."""
        return self._pins.get(name, 0) > 0

    def pins(self) -> Sequence[str]:
        """All that somebody at work counts on."""
        return list(self._pins)

    async def collect(self, *, grace: bool = True) -> Collected:
        """Remove what is out of reach. With grace, blobs written lately and parts of them stay, for their next user."""
        async with self.changing:
            now = time.time_ns() if grace else MAX_NS
            pinned = list(self._pins)
            collected = await write_much(self._database, lambda t: _collect_rows(t, now, pinned, self._driver))
            failpoint("images.collect.after_rows")
            await run_blocking(self._content.remove, collected.blobs)
        if not grace:
            names, reclaimed = await run_blocking(self._partials.collect, grace=False)
            collected.names += names
            collected.reclaimed_bytes += reclaimed
        self._tending.remove(collected.trees)
        if collected.names:
            log.info("images.collected", count=len(collected.names), reclaimed_bytes=collected.reclaimed_bytes)
        return collected

    async def stop(self) -> None:
        """End what runs in the background."""
        self.stop_timer()
        while self._ending:
            await asyncio.wait(set(self._ending))

    async def end_expired(self) -> None:
        """Delete leases whose time is over, with what they alone kept; and come back when the next one ends."""
        expiry = self._database.read_sync(leases.next_expiry_ns)
        if expiry is not None and expiry <= time.time_ns():
            self._tending.remove(await write_much(self._database, leases.end_expired))
            await self.collect()
        self.schedule()

    def schedule(self) -> None:
        """Wake up when the next lease ends."""
        self.stop_timer()
        expiry = self._database.read_sync(leases.next_expiry_ns)
        if expiry is not None:
            delay = max(expiry - time.time_ns(), 0) / 1e9 + 0.001
            self._timer = asyncio.get_running_loop().call_later(delay, self._wake)

    def stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        task = asyncio.ensure_future(self.end_expired())
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (e := task.exception()) is not None:
            log.warning("images.leases_not_ended", error=str(e))


def _collect_rows(transaction: Transaction, now: int, pinned: Sequence[str], driver: str) -> Collected:
    collected = Collected()
    for row in reach.delete_blobs(transaction, now_ns=now, pinned=pinned):
        collected.blobs.append(Digest(row["digest"]))
        collected.names.append(row["digest"])
        collected.reclaimed_bytes += row["size_bytes"]
    for row in reach.delete_layers(transaction, now_ns=now, driver=driver, pinned=pinned):
        collected.trees.append(TreeId(row["id"]))
        collected.names.append(row["key"])
        collected.reclaimed_bytes += row["size_bytes"]
    if collected.names:
        facts = {"blobs": len(collected.blobs), "layers": len(collected.trees), "bytes": collected.reclaimed_bytes}
        transaction.journal("content.collected", "content", facts, namespace=SHARED)
    return collected
