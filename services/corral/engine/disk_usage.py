"""What is on disk: what images says of its own, with the names that containers have for it, and volumes."""

import asyncio

from corral.api.engine.v1.engine_pb2 import ContainerUsage, DiskUsageResponse, VolumeUsage
from corral.api.images.v1 import images_pb2
from corral.engine import bounded_volumes, store, volume_rows
from corral.engine.core import Core
from corral.engine.records import from_ns
from corral.engine.volume_rows import VolumeRecord
from corral.rpc.blocking import run_blocking
from corral.rpc.context import current_namespace
from corral.store import Snapshot
from corral.store.measuring import measure_tree

PARALLEL = 4
"""Volumes that are walked at a time."""


class DiskUsage:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def usage(self) -> DiskUsageResponse:
        """Of the caller's namespace. Trees are walked on threads. Raises Unavailable."""
        images, volumes = await asyncio.gather(
            self._core.leaves.images.DiskUsage(images_pb2.DiskUsageRequest()), self._volumes()
        )
        sizes = {tree.key: tree.size_bytes for tree in images.snapshots}
        namespace = current_namespace()
        containers = await self._core.database.read(lambda view: _containers(view, namespace, sizes))
        return DiskUsageResponse(images=images, containers=containers, volumes=volumes)

    async def _volumes(self) -> list[VolumeUsage]:
        namespace = current_namespace()
        found = await self._core.database.read(lambda view: volume_rows.volumes(view, namespace))
        limit = asyncio.Semaphore(PARALLEL)

        async def measured(volume: VolumeRecord) -> VolumeUsage:
            async with limit:
                size = await run_blocking(self._measure, volume)
            return VolumeUsage(
                name=volume.name, anonymous=volume.anonymous, containers=len(volume.containers), size_bytes=size
            )

        return list(await asyncio.gather(*map(measured, found)))

    def _measure(self, volume: VolumeRecord) -> int:
        directory = self._core.volume_root(volume.namespace) / volume.name
        if volume.lies_elsewhere:
            return 0  # nothing of it is on this disk, and its server may be gone
        if volume.quota_bytes:
            return bounded_volumes.used_bytes(directory)
        try:
            return measure_tree(directory / "data")[0]
        except OSError:  # it went meanwhile
            return 0


def _containers(view: Snapshot, namespace: str, sizes: dict[str, int]) -> list[ContainerUsage]:
    used: dict[str, list[str]] = {}
    for volume in volume_rows.volumes(view, namespace):
        for container in volume.containers:
            used.setdefault(container, []).append(volume.name)
    return [
        ContainerUsage(
            id=record.id,
            name=record.name,
            image=record.config.image,
            command=" ".join(record.config.args),
            status=record.status.wire,
            created_at=from_ns(record.created_ns),
            size_bytes=sizes.get(record.id, 0),
            volumes=used.get(record.id, ()),
        )
        for record in store.containers(view, namespace)
    ]
