"""corral.images.v1.Snapshots."""
# ruff: noqa: N802 (methods are named as the RPCs are)

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from corral.api.images.v1 import images_pb2 as pb
from corral.api.images.v1 import images_pb2_grpc
from corral.images import wire
from corral.images.committer import Committer
from corral.images.drivers import Drivers
from corral.images.host_mounts import HostMounts
from corral.images.images import Images
from corral.images.servicers.call import lease_of
from corral.images.snapshots import Snapshots, Wanted
from corral.images.takeout import Takeout
from corral.images.trees import Kind
from corral.rpc.blocking import run_blocking
from corral.rpc.context import current_namespace

type Context = grpc.aio.ServicerContext[Any, Any]


class SnapshotsServicer(images_pb2_grpc.SnapshotsServicer):
    """See the proto."""

    def __init__(
        self,
        snapshots: Snapshots,
        images: Images,
        drivers: Drivers,
        committer: Committer,
        takeout: Takeout,
        host_mounts: HostMounts,
    ) -> None:
        self._snapshots = snapshots
        self._committer = committer
        self._takeout = takeout
        self._host_mounts = host_mounts
        self._images = images
        self._drivers = drivers

    async def Prepare(self, request: pb.PrepareSnapshotRequest, context: Context) -> pb.PrepareSnapshotResponse:
        return await self._prepare(request, context, Kind.ACTIVE)

    async def View(self, request: pb.PrepareSnapshotRequest, context: Context) -> pb.PrepareSnapshotResponse:
        return await self._prepare(request, context, Kind.VIEW)

    async def _prepare(
        self, request: pb.PrepareSnapshotRequest, context: Context, kind: Kind
    ) -> pb.PrepareSnapshotResponse:
        wanted = Wanted(
            namespace=current_namespace(),
            key=request.key,
            kind=kind,
            image=request.image,
            parent=request.parent_snapshot,
            labels=dict(request.labels),
            lease=lease_of(context),
            quota_bytes=request.quota_bytes,
            persist_later=request.persist_later,
        )
        prepared = await self._snapshots.prepare(wanted)
        image = wire.from_image(self._images.view(prepared.image)) if prepared.image else None
        return pb.PrepareSnapshotResponse(
            mounts=[wire.from_mount(mount) for mount in prepared.mounts], image=image, driver=prepared.record.driver
        )

    async def Persist(self, request: pb.PersistRequest, context: Context) -> pb.PersistResponse:
        await self._snapshots.persist()
        return pb.PersistResponse()

    async def Mounts(self, request: pb.SnapshotRequest, context: Context) -> pb.SnapshotMounts:
        mounts = self._snapshots.mounts(current_namespace(), request.key)
        return pb.SnapshotMounts(mounts=[wire.from_mount(mount) for mount in mounts])

    async def Get(self, request: pb.SnapshotRequest, context: Context) -> pb.Snapshot:
        record = self._snapshots.get(current_namespace(), request.key)
        return wire.from_tree(record, self._snapshots.parent_key(record))

    async def List(self, request: pb.ListSnapshotsRequest, context: Context) -> pb.ListSnapshotsResponse:
        found = await self._snapshots.list(current_namespace(), Kind(request.kind) if request.kind else None)
        return pb.ListSnapshotsResponse(snapshots=[wire.from_tree(record, parent) for record, parent in found])

    async def Remove(self, request: pb.RemoveSnapshotRequest, context: Context) -> pb.RemoveSnapshotResponse:
        await self._snapshots.remove(current_namespace(), request.key, must_exist=request.must_exist)
        return pb.RemoveSnapshotResponse()

    async def Commit(self, request: pb.CommitSnapshotRequest, context: Context) -> pb.Snapshot:
        record = await self._snapshots.commit(current_namespace(), request.key, request.name)
        return wire.from_tree(record, self._snapshots.parent_key(record))

    async def Usage(self, request: pb.SnapshotRequest, context: Context) -> pb.SnapshotUsage:
        namespace = current_namespace()
        usage = await self._snapshots.usage(namespace, request.key)
        return wire.from_usage(usage, self._snapshots.below_bytes(namespace, request.key))

    async def Changes(self, request: pb.SnapshotRequest, context: Context) -> AsyncIterator[pb.SnapshotChanges]:
        async with aclosing(self._committer.changes(current_namespace(), request.key)) as found:
            async for some in found:
                yield pb.SnapshotChanges(changes=[wire.from_change(kind, path) for kind, path in some])

    async def Export(self, request: pb.SnapshotRequest, context: Context) -> AsyncIterator[pb.ExportResponse]:
        async with aclosing(self._takeout.run(current_namespace(), request.key)) as chunks:
            async for chunk in chunks:
                yield pb.ExportResponse(data=chunk)

    async def Mount(self, request: pb.MountImageRequest, context: Context) -> pb.Snapshot:
        record = await self._host_mounts.mount(
            current_namespace(), request.image, request.directory, writable=request.writable
        )
        return wire.from_tree(record, self._snapshots.parent_key(record))

    async def Unmount(self, request: pb.UnmountImageRequest, context: Context) -> pb.UnmountImageResponse:
        await self._host_mounts.unmount(current_namespace(), request.directory)
        return pb.UnmountImageResponse()

    async def Drivers(self, request: pb.DriversRequest, context: Context) -> pb.DriversResponse:
        reasons, default = await run_blocking(self._drivers.reasons), self._drivers.default.name
        return pb.DriversResponse(
            drivers=[
                pb.Driver(name=name, usable=not reason, reason=reason, is_default=name == default)
                for name, reason in reasons.items()
            ]
        )
