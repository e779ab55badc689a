"""What users have stopped, written down: at once, or, where the disk takes nothing, as soon as it does.

A container can be stopped without a disk, and what fills one up may be that very container. Until its stop is written
it is known here, and its restart policy leaves the container alone.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from corral.api.engine.v1.engine_pb2 import RestartPolicy
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine import store
from corral.engine.core import Core
from corral.engine.records import ContainerRecord
from corral.rpc.errors import from_os_error

log = structlog.get_logger()

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 2.0


class Stops:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def note(self, record: ContainerRecord) -> OSError | None:
        """A user wants it to end, and to stay so whatever its restart policy. Returns why that is not written yet."""
        try:
            await self._write(record, durable=_has_policy(record))
        except OSError as e:
            log.error("container.stop_not_written", container=record.id, error=str(e))
            self._core.unwritten_stops.add((record.namespace, record.id))
            self._core.background.spawn_endless(self._later(lambda: self._write_if_meant(record)))
            return e
        return None

    async def ended(self, record: ContainerRecord, status: ExitStatus) -> ContainerRecord:
        """It has ended so, by being stopped."""
        try:
            return await self._write_end(record, status)
        except OSError as e:
            log.error("container.end_not_written", container=record.id, error=str(e))
            self._core.background.spawn_endless(self._later(lambda: self._write_end(record, status)))
            return record.with_exit(status)

    async def _write(self, record: ContainerRecord, *, durable: bool) -> None:
        await self._core.database.write(lambda tx: store.set_stopped_by_user(tx, record), durable=durable)

    async def _write_if_meant(self, record: ContainerRecord) -> None:
        key = (record.namespace, record.id)
        if key in self._core.unwritten_stops:  # else a user has started it since
            await self._write(record, durable=_has_policy(record))
            self._core.unwritten_stops.discard(key)

    async def _write_end(self, record: ContainerRecord, status: ExitStatus) -> ContainerRecord:
        ended = await self._core.record_exit(record, status)
        if ended.exit is not None:  # else it runs anew since
            facts = store.exit_facts(ended)
            await self._core.database.write(
                lambda tx: tx.journal("container.stopped", record.id, facts, namespace=record.namespace)
            )
        return ended

    async def _later(self, write: Callable[[], Awaitable[object]]) -> None:
        delay_s = RETRY_FIRST_S
        while True:
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_MOST_S)
            try:
                await write()
            except OSError as e:
                log.debug("container.not_written", error=str(e), next_s=delay_s)
            else:
                return


def refuse_unless_certain(record: ContainerRecord, unwritten: OSError | None) -> None:
    """Of one that was stopped: raises CorralError if its restart policy may start it again after all."""
    if unwritten is not None and _has_policy(record):
        raise from_os_error(
            unwritten,
            f"container {record.name} has been stopped, which can't be written down: if the daemon ends before it can,"
            " its restart policy starts it again",
        )


def _has_policy(record: ContainerRecord) -> bool:
    return record.config.restart.mode > RestartPolicy.MODE_NO
