"""Ports of a container that has ended are free for others; its next start publishes them again, with its network."""

import asyncio
from contextlib import suppress

import structlog

from corral.api.network.v1.network_pb2 import UnpublishRequest
from corral.engine.core import Core, Key
from corral.engine.leaves import persistently
from corral.engine.records import ContainerRecord, Status
from corral.rpc.context import in_namespace
from corral.rpc.errors import CorralError, NotFound

log = structlog.get_logger()


class Ports:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def on_exit(self, record: ContainerRecord) -> None:
        """A container has ended, or was found so, and is not about to run again."""
        if record.endpoint is not None and record.endpoint.ports:
            key = (record.namespace, record.id)
            freeing = self._core.freeing[key] = self._core.background.spawn_endless(self._withdraw(record))
            freeing.add_done_callback(lambda task: self._freed(key, task))

    def _freed(self, key: Key, task: asyncio.Task[None]) -> None:
        if self._core.freeing.get(key) is task:
            del self._core.freeing[key]

    async def _withdraw(self, record: ContainerRecord) -> None:
        key = (record.namespace, record.id)
        with in_namespace(record.namespace), suppress(NotFound):
            async with self._core.locks.of(key):
                if self._core.get(*key).status is not Status.EXITED:
                    return
                unpublish = self._core.leaves.endpoints.Unpublish
                try:
                    await persistently(lambda: unpublish(UnpublishRequest(endpoint_id=record.id)))
                except NotFound:  # after a boot there is no endpoint
                    return
                except CorralError as e:
                    log.warning("ports.not_withdrawn", container=record.id, error=str(e))
