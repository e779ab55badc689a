"""Collection: what nothing refers to goes.

    lease, image ------> manifest, index ------> config, layer blobs        (blob_edges)
    lease, image, active tree, committed by name ------> layer ------> layer below

An image keeps the layers of the driver that new trees are made with. Those of another one only what lies on them does.

Which rows are in reach is one recursive query each. Rows go first, in one transaction; files after them, so that a
crash in between leaves files without a row, which the next start removes.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import structlog

from corral.images import leases
from corral.images.content import ContentStore
from corral.images.digest import Digest
from corral.images.partials import Partials
from corral.images.snapshotter import TreeId
from corral.images.store import write_much
from corral.images.tending import Tending
from corral.images.trees import Kind
from corral.rpc.blocking import run_blocking
from corral.store import Database, Transaction, failpoint

MAX_NS = (1 << 63) - 1

log = structlog.get_logger()

_DELETE_BLOBS = """
WITH RECURSIVE reached(digest) AS (
    SELECT target_digest FROM images
    UNION SELECT manifest_digest FROM images
    UNION SELECT key FROM lease_resources WHERE kind = 'blob'
    UNION SELECT value FROM json_each(:pinned)
    UNION SELECT child FROM blob_edges JOIN reached ON parent = digest
)
DELETE FROM blobs WHERE keep_until_ns <= :now AND digest NOT IN (SELECT digest FROM reached)
RETURNING digest, size_bytes
"""
_DELETE_LAYERS = """
WITH RECURSIVE reached(id) AS (
    SELECT id FROM snapshots WHERE kind != :committed OR namespace != ''
    UNION SELECT id FROM snapshots WHERE driver = :driver AND key IN (SELECT chain_id FROM images)
    UNION SELECT id FROM snapshots WHERE key IN (SELECT key FROM lease_resources WHERE kind = 'layer')
    UNION SELECT id FROM snapshots WHERE key IN (SELECT value FROM json_each(:pinned))
    UNION SELECT parent FROM snapshots JOIN reached USING (id) WHERE parent IS NOT NULL
)
DELETE FROM snapshots WHERE kind = :committed AND namespace = '' AND id NOT IN (SELECT id FROM reached)
RETURNING id, key, size_bytes
"""


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

    async def collect(self, *, grace: bool = True) -> Collected:
        """Remove what is out of reach. With grace, blobs written lately and parts of them stay, for their next user."""
        async with self.changing:
            now = time.time_ns() if grace else MAX_NS
            pinned = json.dumps(list(self._pins))
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


def _collect_rows(transaction: Transaction, now: int, pinned: str, driver: str) -> Collected:
    collected = Collected()
    for row in transaction.execute(_DELETE_BLOBS, {"now": now, "pinned": pinned}):
        collected.blobs.append(Digest(row["digest"]))
        collected.names.append(row["digest"])
        collected.reclaimed_bytes += row["size_bytes"]
    for row in transaction.execute(_DELETE_LAYERS, {"committed": Kind.COMMITTED, "pinned": pinned, "driver": driver}):
        collected.trees.append(TreeId(row["id"]))
        collected.names.append(row["key"])
        collected.reclaimed_bytes += row["size_bytes"]
    return collected
