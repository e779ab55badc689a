"""How much containers have written: asked of images where somebody wants to know, since it may have to walk a tree."""

import asyncio
import time
from collections.abc import Iterable

from corral.api.engine.v1.engine_pb2 import Container, ContainerStats, StorageStats
from corral.api.images.v1.images_pb2 import SnapshotRequest, SnapshotUsage
from corral.engine.core import Core
from corral.engine.records import ContainerRecord
from corral.rpc.errors import NotFound, Unavailable

PARALLEL = 8
STATS_PAUSE_S = 5.0
"""A tree is looked at so often for stats, however often these are read."""


class Sizes:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._known: dict[str, tuple[float, SnapshotUsage]] = {}

    async def fill_in(self, containers: Iterable[Container]) -> None:
        """Say in each message how large the container is. One whose tree is gone keeps its silence."""
        limit = asyncio.Semaphore(PARALLEL)

        async def one(container: Container) -> None:
            async with limit:
                usage = await self._usage(container.snapshot_key)
            if usage is not None:
                container.size_rw_bytes = usage.size_bytes
                container.size_root_bytes = usage.size_bytes + usage.below_bytes

        await asyncio.gather(*map(one, containers))

    async def _usage(self, key: str) -> SnapshotUsage | None:
        try:
            return await self._core.leaves.snapshots.Usage(SnapshotRequest(key=key))
        except (NotFound, Unavailable):
            return None

    async def measure(self, record: ContainerRecord, stats: ContainerStats) -> None:
        """Add to its stats what a container with a quota has used of it."""
        if not record.config.storage_quota_bytes:
            return
        now = time.monotonic()
        read_at, usage = self._known.get(record.id, (0.0, None))
        if usage is None or now - read_at > STATS_PAUSE_S:
            usage = await self._usage(record.id)
            self._known = {id_: known for id_, known in self._known.items() if now - known[0] < 2 * STATS_PAUSE_S}
            if usage is None:
                return
            self._known[record.id] = now, usage
        storage = StorageStats(used_bytes=usage.size_bytes, quota_bytes=record.config.storage_quota_bytes)
        stats.storage.CopyFrom(storage)
