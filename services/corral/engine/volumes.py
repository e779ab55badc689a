"""Volumes: directories of the engine's own that outlive containers. The one driver is `local`."""

import errno
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from corral.api.engine.v1.engine_pb2 import CreateVolumeRequest, Volume
from corral.engine import bounded_volumes, mounted_volumes, volume_rows
from corral.engine.core import Core, Key
from corral.engine.naming import random_id
from corral.engine.records import from_ns
from corral.engine.volume_rows import VolumeRecord
from corral.rpc.blocking import run_blocking
from corral.rpc.context import check_id, current_namespace
from corral.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, from_os_error
from corral.store import Duplicate, Referenced, Snapshot, Transaction, failpoint

DRIVER = "local"

log = structlog.get_logger()


class Volumes:
    """See the module. Names are unique in a namespace."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def create(self, request: CreateVolumeRequest) -> Volume:
        """Raises AlreadyExists, InvalidArgument."""
        if request.driver not in ("", DRIVER):
            raise InvalidArgument(f"there is no volume driver {request.driver!r}: the only one is {DRIVER!r}")
        options = dict(request.options)
        _check_options(options)
        if bounded_volumes.quota_bytes(options):
            await run_blocking(bounded_volumes.check_bounds, self._core.config.root)
        name = check_id(request.name, "volume name") if request.name else random_id()
        labels, now = dict(request.labels), time.time_ns()
        volume = VolumeRecord(current_namespace(), name, not request.name, now, labels, options)
        return await self._core.background.to_the_end(self._alone(volume, self._create(volume)))

    async def _alone[T](self, volume: VolumeRecord, change: Coroutine[Any, Any, T]) -> T:
        async with self._core.volume_locks.of((volume.namespace, volume.name)):
            return await change

    async def _create(self, volume: VolumeRecord) -> Volume:
        try:
            await self._core.database.write(lambda tx: volume_rows.insert_volume(tx, volume), durable=True)
        except Duplicate as e:
            raise AlreadyExists(f"a volume named {volume.name!r} exists already", reason="VOLUME_EXISTS") from e
        failpoint("engine.volume.after_row")
        # Should this not happen any more, the first container that uses the volume makes the directory.
        try:
            await run_blocking(bounded_volumes.prepare, self._directory(volume), volume.options)
        except OSError as e:
            await self._remove(volume)
            raise from_os_error(e, f"cannot make the volume {volume.name!r}") from e
        return self._message(volume)

    async def get(self, name: str) -> Volume:
        """Raises NotFound."""
        namespace = current_namespace()
        return self._message(self._core.database.read_sync(lambda view: volume_rows.get_volume(view, namespace, name)))

    async def every(self) -> list[Volume]:
        """All of the namespace, by name."""
        namespace = current_namespace()
        found = await self._core.database.read(lambda view: volume_rows.volumes(view, namespace))
        return [self._message(volume) for volume in found]

    async def remove(self, name: str) -> None:
        """Raises NotFound, FailedPrecondition while a container uses it."""
        namespace = current_namespace()
        volume = self._core.database.read_sync(lambda view: volume_rows.get_volume(view, namespace, name))
        await self._core.background.to_the_end(self._alone(volume, self._remove(volume)))

    async def _remove(self, volume: VolumeRecord) -> None:
        if volume.lies_elsewhere and not volume.containers:
            await self._release(volume)
        try:
            await self._core.database.write(
                lambda tx: volume_rows.delete_volume(tx, volume.namespace, volume.name), durable=True
            )
        except Referenced as e:
            users = ", ".join(id_[:12] for id_ in volume.containers) or "a container"
            raise FailedPrecondition(
                f"the volume {volume.name!r} is used by {users}: remove that first", reason="VOLUME_IN_USE"
            ) from e
        failpoint("engine.volume.after_removal")
        await self._remove_directory(volume)

    async def _release(self, volume: VolumeRecord) -> None:
        """Before it is forgotten, so that one that is busy is still there, whole."""
        try:
            await run_blocking(mounted_volumes.release, self._directory(volume) / "data")
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            raise FailedPrecondition(
                f"the volume {volume.name!r} is in use: somebody has files of it open, or mounts in it",
                reason="VOLUME_IN_USE",
            ) from e

    async def _remove_directory(self, volume: VolumeRecord) -> None:
        await run_blocking(
            lambda: bounded_volumes.remove(self._directory(volume), lies_elsewhere=volume.lies_elsewhere)
        )

    async def prune(self, *, everything: bool) -> list[str]:
        """Remove anonymous volumes that no container uses, with `everything` named ones too; returns their names.

        One that lies elsewhere, and is busy there, stays.
        """
        namespace = current_namespace()

        def unused(view: Snapshot, *, elsewhere: bool) -> list[VolumeRecord]:
            return [
                volume
                for volume in volume_rows.volumes(view, namespace)
                if not volume.containers and (volume.anonymous or everything) and volume.lies_elsewhere == elsewhere
            ]

        keys = [
            (namespace, each.name) for each in self._core.database.read_sync(lambda view: unused(view, elsewhere=False))
        ]

        def forget(tx: Transaction) -> list[VolumeRecord]:
            forgotten = [each for each in unused(tx, elsewhere=False) if (namespace, each.name) in keys]
            for volume in forgotten:
                volume_rows.delete_volume(tx, namespace, volume.name)
            return forgotten

        async with self._core.volume_locks.of_all(keys):
            removed = await self._core.database.write(forget, durable=True)
            for volume in removed:
                await self._remove_directory(volume)
        for volume in self._core.database.read_sync(lambda view: unused(view, elsewhere=True)):
            with suppress(FailedPrecondition, NotFound):
                await self._alone(volume, self._remove(volume))
                removed.append(volume)
        return [volume.name for volume in removed]

    def _directory(self, volume: VolumeRecord) -> Path:
        return self._core.volume_root(volume.namespace) / volume.name

    def _message(self, volume: VolumeRecord) -> Volume:
        return Volume(
            name=volume.name,
            driver=DRIVER,
            mountpoint=str(self._directory(volume) / "data"),
            created_at=from_ns(volume.created_ns),
            labels=volume.labels,
            options=volume.options,
            anonymous=volume.anonymous,
            containers=volume.containers,
            quota_bytes=volume.quota_bytes,
            used_bytes=bounded_volumes.used_bytes(self._directory(volume)) if volume.quota_bytes else 0,
        )


def _check_options(options: Mapping[str, str]) -> None:
    """Raises InvalidArgument."""
    if unknown := options.keys() - {bounded_volumes.SIZE} - mounted_volumes.OPTIONS:
        raise InvalidArgument(
            f"{min(unknown)!r} is no option of a volume: there are 'size', or 'type', 'device' and 'o'",
            reason="BAD_OPTION",
        )
    if "rbind" in options.get("o", "").split(","):
        raise InvalidArgument("a volume cannot be an rbind, whose submounts would stay: use bind", reason="BAD_OPTION")
    if mounted_volumes.source_of(options) is not None and bounded_volumes.SIZE in options:
        raise InvalidArgument("a volume that lies elsewhere cannot be bounded by 'size'", reason="BAD_OPTION")


async def remove_unknown(core: Core, key: Key) -> None:
    """The directory of a volume whose row is gone, unless another of that name was made meanwhile. Raises OSError."""
    async with core.volume_locks.of(key):
        try:
            core.database.read_sync(lambda view: volume_rows.get_volume(view, *key))
        except NotFound:
            await run_blocking(bounded_volumes.remove, core.volume_root(key[0]) / key[1])


def sweep(core: Core) -> None:
    """Remove directories of volumes that no row describes, and make those that a row lacks: what a crash between row
    and directory left. Those that are file systems of their own are mounted again, should there have been a reboot.

    Called at start-up, before any volume can be made.
    """
    volumes = core.database.read_sync(lambda view: volume_rows.volumes(view, None))
    known = {(volume.namespace, volume.name) for volume in volumes}
    root = core.config.root / "volumes"
    for directory in root.glob("*/*"):
        if (directory.parent.name, directory.name) not in known:
            try:
                bounded_volumes.remove(directory)
            except OSError as e:  # it is busy, say: the next start comes to it again
                log.warning("volume.not_removed", directory=str(directory), error=str(e))
    for volume in volumes:
        directory = core.volume_root(volume.namespace) / volume.name
        if volume.lies_elsewhere and mounted_volumes.is_mounted(directory / "data"):
            continue
        if volume.quota_bytes or not (directory / "data").is_dir():
            try:
                bounded_volumes.prepare(directory, volume.options)
            except OSError as e:  # whoever wants to use it is told
                log.warning("volume.not_ready", volume=volume.name, error=str(e))
