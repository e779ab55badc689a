"""An image of what a container has written."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from corral.api.engine.v1.engine_pb2 import CommitContainerRequest
from corral.api.images.v1.images_pb2 import CommitImageRequest, GetImageRequest, Image, ImageConfig
from corral.engine.changes import change
from corral.engine.core import Core
from corral.engine.lifecycle import Lifecycle
from corral.engine.records import ContainerRecord, Status
from corral.rpc.errors import FailedPrecondition, NotFound
from corral.store import failpoint


class Commits:
    """See the module."""

    def __init__(self, core: Core, lifecycle: Lifecycle) -> None:
        self._core = core
        self._lifecycle = lifecycle

    async def commit(self, request: CommitContainerRequest) -> Image:
        """The image. The container is paused meanwhile, so that what it writes goes in whole or not at all.

        Raises NotFound, FailedPrecondition, InvalidArgument.
        """
        record = self._core.resolve(request.container)
        config = await self._config(record)
        change(config, request.changes)
        wanted = CommitImageRequest(
            key=record.id,
            name=request.name,
            config=config,
            author=request.author,
            comment=request.comment,
            created_by=" ".join((*record.config.entrypoint, *record.config.args)),
        )
        return await self._core.background.to_the_end(self._commit(record, wanted, pause=not request.no_pause))

    async def _commit(self, record: ContainerRecord, wanted: CommitImageRequest, *, pause: bool) -> Image:
        if not pause or record.status is not Status.RUNNING:
            return await self._core.leaves.images.Commit(wanted)
        async with self._paused(record):
            failpoint("engine.commit.while_paused")
            return await self._core.leaves.images.Commit(wanted)

    @asynccontextmanager
    async def _paused(self, record: ContainerRecord) -> AsyncIterator[None]:
        """It may have ended before, or be killed, removed or resumed within: then there is nothing to resume."""
        paused = False
        with suppress(FailedPrecondition):
            paused = (await self._lifecycle.pause(record.id, passing=True)).status is Status.PAUSED
        try:
            yield
        finally:
            if paused:
                with suppress(FailedPrecondition, NotFound):
                    await self._lifecycle.resume(record.id)

    async def _config(self, record: ContainerRecord) -> ImageConfig:
        """The image's, with what the container was made with in its place."""
        own = record.config
        config = ImageConfig()
        config.CopyFrom((await self._core.leaves.images.Get(GetImageRequest(name=record.image_id))).config)
        config.entrypoint[:] = own.entrypoint
        config.cmd[:] = own.args
        config.env[:] = own.env
        config.user, config.working_dir, config.stop_signal = own.user, own.working_dir, own.stop_signal
        config.labels.update(own.labels)
        if own.HasField("healthcheck"):
            config.healthcheck.CopyFrom(own.healthcheck)
        return config
