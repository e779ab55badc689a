"""Room on the disk: above a high mark of the file system's use, what nobody uses goes until the low mark is reached.

First what nothing refers to, then images that nobody uses, the longest unused first and one by one, then what is left
of interrupted pulls. What a container, a lease, or a pull or push under way is on never goes, nor what was used lately.
"""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from corral.images import catalog, disuse
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.config import ImagesConfig
from corral.images.partials import Partials
from corral.images.store import write_much
from corral.images.tending import Tending
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, InvalidArgument
from corral.store import Database, Transaction

log = structlog.get_logger()

FIRST_S = 5.0  # after the start, which has enough to do


@dataclass(frozen=True, slots=True)
class Space:
    """Of a file system, as df(1) reckons: what root alone may use counts as neither."""

    used_bytes: int
    available_bytes: int

    @property
    def used_percent(self) -> float:
        return 100 * self.used_bytes / max(self.used_bytes + self.available_bytes, 1)

    def above(self, percent: float) -> int:
        """How many bytes have to go for no more than that to be in use; 0 if none."""
        return max(self.used_bytes - int((self.used_bytes + self.available_bytes) * percent / 100), 0)


def space_of(path: Path) -> Space:
    """Blocking. Raises OSError."""
    found = os.statvfs(path)
    return Space((found.f_blocks - found.f_bfree) * found.f_frsize, found.f_bavail * found.f_frsize)


class Reclaimer:
    """Looks from time to time, from start() on, and when woken."""

    def __init__(
        self, config: ImagesConfig, database: Database, collector: Collector, partials: Partials, tending: Tending
    ) -> None:
        """Raises InvalidArgument for marks that cannot be."""
        self._config = config
        self._high, self._low = config.gc_high_percent, config.gc_low_percent
        if not 0 <= self._low <= self._high <= 100:
            raise InvalidArgument(
                f"[images] gc_low_percent = {self._low:g} and gc_high_percent = {self._high:g} cannot be marks of a"
                " disk's use: set them to 0 to 100, the low one not above the high one"
            )
        self._database = database
        self._collector = collector
        self._partials = partials
        self._tending = tending
        self._woken = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._is_short = False

    def start(self) -> None:
        if self._high < 100:
            self._collector.on_growth = self._woken.set
            self._watching = asyncio.ensure_future(self._watch())

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait((self._watching,))

    async def _watch(self) -> None:
        delay_s = min(FIRST_S, self._config.gc_interval_s)
        while True:
            try:
                async with asyncio.timeout(delay_s):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            delay_s = self._config.gc_interval_s
            try:
                await self.run()
            except (CorralError, OSError) as e:
                log.warning("images.space_not_reclaimed", error=str(e))

    async def run(self) -> list[ImageRecord]:
        """Look once, and do what has to be done; returns the names that went."""
        space = await run_blocking(space_of, self._config.root)
        if space.used_percent < self._high:
            self._is_short = False
            return []
        await self._collector.end_expired()
        await self._collector.collect()
        gone: list[ImageRecord] = []
        while (excess := await self._excess()) > 0 and (removed := await self._remove_images(excess)):
            gone += removed
        if await self._excess() > 0:
            await run_blocking(self._partials.collect, grace=False)
        await self._tell(gone)
        return gone

    async def _excess(self) -> int:
        """Measured when the trees that are on their way out have gone."""
        await self._tending.done()
        return (await run_blocking(space_of, self._config.root)).above(self._low)

    async def _remove_images(self, excess_bytes: int) -> list[ImageRecord]:
        """The longest unused ones, until so much has gone with them or none is left."""
        gone: list[ImageRecord] = []
        freed = 0
        while freed < excess_bytes and (removed := await write_much(self._database, self._remove_oldest)):
            freed += (await self._collector.collect()).reclaimed_bytes
            gone += removed
        if gone:
            await self._database.persist()
        return gone

    def _remove_oldest(self, transaction: Transaction) -> list[ImageRecord]:
        before_ns = time.time_ns() - int(self._config.gc_min_age_s * 1e9)
        for image in disuse.unused(transaction, None, self._collector.is_pinned):
            if image.used_ns <= before_ns:
                catalog.remove(transaction, image.records, reason=f"the disk was above {self._high:g} %")
                return list(image.records)
        return []

    async def _tell(self, gone: list[ImageRecord]) -> None:
        space = await run_blocking(space_of, self._config.root)
        is_short = space.used_percent >= self._high
        if gone:
            log.info("images.space_reclaimed", images=len(gone), used_percent=round(space.used_percent, 1))
        if is_short and not self._is_short:
            remedy = "remove containers and volumes, or make the disk larger: nothing more can be removed by itself"
            log.warning("images.space_short", used_percent=round(space.used_percent, 1), remedy=remedy)
        self._is_short = is_short
