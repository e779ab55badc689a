"""The images leaf as one hosted service: puts its parts together, and recovers what an earlier process left."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import grpc.aio
import structlog

from corral.api.images.v1 import images_pb2, images_pb2_grpc
from corral.images.accounting import Accounts
from corral.images.admission import Admission
from corral.images.blobs import Blobs
from corral.images.checking import Checker
from corral.images.collector import Collector
from corral.images.committer import Committer
from corral.images.config import ImagesConfig
from corral.images.content import ContentStore
from corral.images.drivers import Drivers, on_devices
from corral.images.exporter import Exporter
from corral.images.host_mounts import HostMounts
from corral.images.images import Images
from corral.images.importer import Importer
from corral.images.marks import Marks
from corral.images.partials import Partials
from corral.images.policy.gate import Gate
from corral.images.rebuilding import Rebuilder, is_lost, open_or_renew
from corral.images.recipes import Recipes
from corral.images.reclaiming import Reclaimer
from corral.images.recovery import recover
from corral.images.registries import Registries
from corral.images.servicers.content import ContentServicer
from corral.images.servicers.images import ImagesServicer
from corral.images.servicers.leases import LeasesServicer
from corral.images.servicers.snapshots import SnapshotsServicer
from corral.images.snapshots import Snapshots
from corral.images.takeout import Takeout
from corral.images.tending import Tending
from corral.images.unpacker import TreeIds, Unpacker
from corral.images.workers import Workers
from corral.rpc.blocking import run_blocking

log = structlog.get_logger()


class ImagesService:
    """See corral.rpc.service.Service."""

    name = "images"

    def __init__(self, config: ImagesConfig) -> None:
        """Raises FailedPrecondition if the driver cannot run there, InvalidArgument for a policy that is none."""
        self._config = config
        gate = Gate(config.policy)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: set[Future[dict[str, Any]]] = set()
        makers = on_devices(config.thin_data, config.thin_metadata)
        self._drivers = Drivers(config.root, config.driver, self._work, makers)
        driver = self._drivers.default
        config.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._drivers.open()
        self._database = open_or_renew(config.root)
        self._content = ContentStore(config.root)
        self._marks = Marks(config.root, self._database)
        self._ids = TreeIds()
        self._tending = Tending(self._drivers, self._ids)
        self._partials = Partials(config.root, keep_s=config.partial_keep_s)
        self._collector = Collector(self._database, self._content, self._partials, self._tending, driver.name)
        self._reclaimer = Reclaimer(config, self._database, self._collector, self._partials, self._tending)
        self._workers = Workers(
            config.workers,
            idle_s=config.unpack_idle_s,
            max_entries=config.max_layer_entries,
            max_bytes=config.max_layer_bytes,
            max_memory_bytes=config.unpack_memory_bytes,
        )
        unpacker = self._unpacker = Unpacker(self._database, self._content, driver, self._workers, self._ids)
        admission = Admission(self._database, self._content, unpacker, self._collector, gate)
        self._importer = Importer(
            self._database,
            self._content,
            unpacker,
            self._collector,
            admission,
            max_bytes=config.max_archive_bytes,
        )
        self._images = Images(self._database, self._content, driver, unpacker, self._collector, gate)
        self._recipes = Recipes(
            self._database, self._content, self._drivers, self._workers, self._collector, self._images.details
        )
        self._snapshots = Snapshots(
            self._database, self._drivers, self._images, self._tending, self._collector, self._ids, gate
        )
        self._committer = Committer(
            self._database,
            self._content,
            self._drivers,
            self._snapshots,
            self._workers,
            unpacker,
            self._collector,
            admission,
        )
        self._blobs = Blobs(self._database, self._content, self._collector, grace_s=config.blob_grace_s)
        self._registries = Registries(
            config,
            self._database,
            self._content,
            self._partials,
            self._blobs,
            unpacker,
            self._collector,
            admission,
            gate,
        )

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        images_pb2_grpc.add_ContentServicer_to_server(ContentServicer(self._blobs), server)
        exporter = Exporter(self._database, self._content, self._blobs, self._collector)
        accounts = Accounts(self._database, self._drivers, self._collector, self._partials, self._images.details)
        images_pb2_grpc.add_ImagesServicer_to_server(
            ImagesServicer(
                self._images,
                self._importer,
                exporter,
                self._committer,
                self._registries,
                accounts,
                self._checker(),
                self._recipes,
                self._database,
                keep_blobs=self._config.keep_blobs,
            ),
            server,
        )
        takeout = Takeout(self._content, self._snapshots, self._workers)
        images_pb2_grpc.add_SnapshotsServicer_to_server(
            SnapshotsServicer(
                self._snapshots, self._images, self._drivers, self._committer, takeout, HostMounts(self._snapshots)
            ),
            server,
        )
        images_pb2_grpc.add_LeasesServicer_to_server(
            LeasesServicer(self._database, self._collector, self._tending), server
        )
        services = images_pb2.DESCRIPTOR.services_by_name.values()
        return [service.full_name for service in services]

    def _checker(self) -> Checker:
        rebuilder = Rebuilder(
            self._config.root,
            self._database,
            self._content,
            self._drivers,
            self._marks,
            self._images.details,
            self._collector,
            self._tending,
            self._ids,
        )
        return Checker(
            self._database,
            self._content,
            self._drivers,
            self._images.details,
            self._unpacker,
            self._collector,
            self._partials,
            self._tending,
            self._ids,
            rebuilder,
        )

    def _work(self, job: Mapping[str, object]) -> Mapping[str, Any]:
        """A driver's heavy job, for a thread to wait for."""
        assert self._loop is not None, "drivers work after start()"
        work = asyncio.run_coroutine_threadsafe(self._workers.run(job, lambda _done: None), self._loop)
        self._jobs.add(work)
        try:
            return work.result()
        finally:
            self._jobs.discard(work)

    async def start(self) -> None:
        """Remove what no row describes, repair what lacks its files, and end the leases whose time is over."""
        self._loop = asyncio.get_running_loop()
        lost = is_lost(self._config.root)
        recovered = await run_blocking(recover, self._database, self._content, self._drivers, lost=lost)
        if not lost:
            await run_blocking(self._recipes.recover)
        self._ids.start_after(max(recovered.highest_tree, await run_blocking(self._marks.highest_tree)))
        self._tending.start()
        self._tending.remove(recovered.orphans)
        await self._collector.end_expired()
        await self._collector.collect()
        self._partials.start()
        self._reclaimer.start()
        self._marks.start(keeping=lost)

    async def stop(self) -> None:
        for work in list(self._jobs):  # nobody waits for them any more but threads, which must end
            work.cancel()
        await self._reclaimer.stop()
        await self._partials.stop()
        await self._registries.stop()
        await self._workers.stop()
        await self._collector.stop()
        await self._tending.stop()
        await self._marks.stop()
        self._importer.close()
        await run_blocking(self._drivers.close)
        self._database.close()
