"""How processes ended, written down: at once, or, where the disk is full, as soon as it has room again.

An end is true whatever the database says: who waits for it does not wait for the disk, and nobody who follows the
journal is never to hear of it.
"""

import asyncio

import structlog

from corral.store import Database, Transaction
from corral.tasks.live import Process, Writing
from corral.tasks.registry import Registry

log = structlog.get_logger()

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 2.0


class Ends:
    """Use from one event loop."""

    def __init__(self, registry: Registry, database: Database) -> None:
        self._registry = registry
        self._database = database
        self._unwritten: dict[Process, Writing] = {}
        self._later: asyncio.Task[None] | None = None

    async def write(self, process: Process, writing: Writing) -> None:
        """Have `writing` tell the database of the end; now, if that can be."""
        try:
            await self._database.write(writing)
        except OSError as e:
            log.error("task.end_not_written", **process.facts, error=str(e))
            self._unwritten[process] = writing
            if self._later is None or self._later.done():
                self._later = self._registry.until_stopped(self._write_later())

    def is_written(self, process: Process) -> bool:
        """Whether the database has been told of its end."""
        return process not in self._unwritten

    async def _write_later(self) -> None:
        delay_s = RETRY_FIRST_S
        while self._unwritten:
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_MOST_S)
            try:
                await self._write_now()
            except OSError as e:
                log.debug("task.end_not_written", error=str(e), next_s=delay_s)

    async def _write_now(self) -> None:
        # Of one that was deleted meanwhile it is written, and another one may have its name.
        wanted = {each: writing for each, writing in self._unwritten.items() if self._registry.has(each)}

        self._unwritten = dict(wanted)

        def write(transaction: Transaction) -> None:
            for writing in wanted.values():
                writing(transaction)

        await self._database.write(write)
        for process in wanted:
            self._unwritten.pop(process, None)
            log.info("task.end_written", **process.facts)
