"""Making a container: an intent, its parts from three leaves at once, its task; all of it or nothing.

    row CREATING -> cgroups.Create || (images.Prepare || network.Attach -> spec) -> tasks.Create -> row CREATED

Whatever fails, the parts are given back in reverse, and the error told is the first one. If the engine dies on the way,
the row is found CREATING at the next start and the same is done then. If the machine dies, the user may have been told
that it is created: what it was made of is on disk by then, and the next start takes the word for it.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import structlog

from corral.api.cgroups.v1.cgroups_pb2 import Cgroup
from corral.api.engine.v1.engine_pb2 import ContainerConfig, CreateContainerRequest, VolumeMount
from corral.api.images.v1.images_pb2 import GetImageRequest, PersistRequest, PrepareSnapshotResponse
from corral.api.network.v1.network_pb2 import Endpoint
from corral.engine import image_mounts, requests, secrets, store, volume_rows
from corral.engine.core import Core, all_ended, require_alive
from corral.engine.leaves import persistently
from corral.engine.naming import random_id, random_name
from corral.engine.options import check
from corral.engine.records import ContainerRecord, Status
from corral.engine.removal import Removal
from corral.engine.resolve import resolve
from corral.engine.task_making import TaskMaking
from corral.engine.volume_rows import VolumeRecord
from corral.rpc.context import check_id, current_namespace
from corral.rpc.errors import AlreadyExists, CorralError, Unimplemented
from corral.store import failpoint

log = structlog.get_logger()

NAME_TRIES = 20


class Creation:
    """See the module."""

    def __init__(self, core: Core, task_making: TaskMaking, removal: Removal) -> None:
        self._core = core
        self._tasks = task_making
        self._removal = removal

    async def create(self, request: CreateContainerRequest) -> ContainerRecord:
        """Raises CorralError; then nothing is left."""
        namespace = current_namespace()
        check(request.config)
        secrets.check(request.config.secrets, (mount.target for mount in request.config.mounts))
        id_ = check_id(request.id, "container id") if request.id else random_id()
        config = self._with_full_ids(request.config)
        for mount in config.mounts:
            if mount.type == VolumeMount.TYPE_VOLUME and not mount.source:
                mount.source = random_id()
        name = check_id(request.name, "container name") if request.name else ""
        record = ContainerRecord(namespace, id_, name, Status.CREATING, config, created_ns=time.time_ns())
        return await self._core.background.to_the_end(self._make(record))

    def _with_full_ids(self, asked: ContainerConfig) -> ContainerConfig:
        """A copy in which containers to join are named by their ids. Raises NotFound, FailedPrecondition."""
        config = ContainerConfig()
        config.CopyFrom(asked)
        for field in ("pid_mode", "ipc_mode", "uts_mode", "cgroupns_mode"):
            setattr(config, field, self._with_full_id(getattr(config, field)))
        config.network.mode = self._with_full_id(config.network.mode)
        return config

    def _with_full_id(self, mode: str) -> str:
        kind, _, reference = mode.partition(":")
        if kind != "container" or not reference:
            return mode
        other = self._core.resolve(reference)
        require_alive(other, "joined")
        return f"container:{other.id}"

    async def _make(self, record: ContainerRecord) -> ContainerRecord:
        key = (record.namespace, record.id)
        if key in self._core.being_made:  # the id was given, as another one's has been
            raise AlreadyExists(f"a container with id {record.id} is being made already", reason="ID_TAKEN")
        self._core.being_made.add(key)
        try:
            record = await self._intend(record)
            try:
                failpoint("engine.create.after_intent")
                return await self._make_all(record)
            except BaseException:
                await self._undo(record)
                raise
        finally:
            self._core.being_made.discard(key)

    async def _intend(self, record: ContainerRecord) -> ContainerRecord:
        """Write the intent down, under a free name if none was given."""
        volumes = _volumes(record.config, record.namespace, anonymous=_anonymous_sources(record.config))
        named = bool(record.name)
        for attempt in range(NAME_TRIES):
            if not named:
                name = random_name()
                record = record._replace(name=name if attempt < NAME_TRIES // 2 else f"{name}{time.time_ns() % 10000}")
            try:
                await self._core.database.write(partial(store.insert_container, record=record, volumes=volumes))
            except AlreadyExists as e:
                if await self._give_back(record, e.metadata.get("container", record.id)):
                    continue
                if named or e.reason != "NAME_TAKEN":
                    raise
                continue
            return record
        raise AlreadyExists("no free name was found: give the container one", reason="NAME_TAKEN")

    async def _give_back(self, record: ContainerRecord, id_: str) -> bool:
        """Finish the undoing of a create that failed, so that whoever tries it again is not told that it was done.

        record: what is to be made; it may have been given the very id of the one that failed. False if the container is
        none such. Raises Unavailable while it can't be undone.
        """
        key = (record.namespace, id_)
        async with self._core.locks.of(key):
            half = self._core.database.read_sync(lambda view: store.find(view, *key))
            if half is None:  # it was given back meanwhile
                return True
            if half.status is not Status.CREATING or (id_ != record.id and key in self._core.being_made):
                return False
            await self._removal.remove(half, volumes=True)
        return True

    async def _make_all(self, record: ContainerRecord) -> ContainerRecord:
        async with self._tasks.cgroup_meanwhile(record) as cgroup:
            prepared, endpoint = await self._parts(record)
            return await self._make_of(record, prepared, endpoint, cgroup)

    async def _make_of(
        self,
        record: ContainerRecord,
        prepared: PrepareSnapshotResponse,
        endpoint: Endpoint,
        cgroup: "asyncio.Task[Cgroup]",
    ) -> ContainerRecord:
        """The kernel may still be at work on the cgroup: what needs none of it is done meanwhile."""
        failpoint("engine.create.after_parts")
        config = resolve(record.config, prepared.image.config, id_=record.id, new_volume_name=random_id)
        await self._add_volumes(record, config)
        record = record._replace(
            config=config,
            image_id=prepared.image.id,
            endpoint=endpoint,
            snapshot_driver=prepared.driver,
        )
        # What a power loss must not take from one that was created reaches the disk while its task is made.
        made: ContainerRecord
        made, _ = await all_ended(self._tasks.make(record, prepared.mounts, cgroup), self._put_on_disk(record, cgroup))
        failpoint("engine.create.after_task")
        created = made._replace(status=Status.CREATED)
        await self._core.database.write(lambda tx: store.save_created(tx, created))
        failpoint("engine.create.after_row")
        return created

    async def _put_on_disk(self, record: ContainerRecord, cgroup: "asyncio.Task[Cgroup]") -> None:
        """Its tree first: whoever finds the row after a power loss takes that for granted."""
        with suppress(Unimplemented):  # an older images has done so before it answered
            await persistently(lambda: self._core.leaves.snapshots.Persist(PersistRequest()))
        whole = record._replace(cgroup_path=(await cgroup).path)
        await self._core.database.write(lambda tx: store.save_parts(tx, whole))
        failpoint("engine.create.after_parts_row")
        await self._core.database.persist()

    async def _parts(self, record: ContainerRecord) -> tuple[PrepareSnapshotResponse, Endpoint]:
        """From two leaves at once."""
        config, namespace, id_ = record.config, record.namespace, record.id
        leaves = self._core.leaves
        exposed: Sequence[str] = ()
        if config.network.publish_all:
            exposed = tuple((await leaves.images.Get(GetImageRequest(name=config.image))).config.exposed_ports)
        attach = requests.network(
            config, namespace, id_, name=record.name, host_hostname=self._core.host.hostname, exposed=exposed
        )
        snapshot = requests.snapshot(config, namespace, id_)
        snapshot.persist_later = True
        prepared, endpoint, _ = await all_ended(
            persistently(lambda: leaves.snapshots.Prepare(snapshot)),
            persistently(lambda: leaves.endpoints.Attach(attach)),
            image_mounts.prepare(leaves, record),
        )
        return prepared, endpoint

    async def _add_volumes(self, record: ContainerRecord, config: ContainerConfig) -> None:
        """Those that only the image asks for."""
        known = {mount.target for mount in record.config.mounts}
        new = [mount for mount in config.mounts if mount.target not in known]
        if new:
            volumes = [VolumeRecord(record.namespace, mount.source, True, record.created_ns, {}, {}) for mount in new]
            await self._core.database.write(
                lambda tx: volume_rows.use_volumes(tx, record.namespace, record.id, volumes)
            )

    async def _undo(self, record: ContainerRecord) -> None:
        """Give everything back. What cannot be given back now is tried again later; the caller's error goes on."""
        try:
            await self._removal.remove(record, volumes=True)
        except (CorralError, OSError) as e:
            log.warning("create.undo_postponed", container=record.id, error=str(e))
            self._removal.postpone(record)


def _anonymous_sources(config: ContainerConfig) -> set[str]:
    """Volume sources that we made up; their names are ids, and nobody can guess one."""
    return {mount.source for mount in config.mounts if len(mount.source) == 64}


def _volumes(config: ContainerConfig, namespace: str, *, anonymous: set[str]) -> Sequence[VolumeRecord]:
    names = {mount.source for mount in config.mounts if mount.type == VolumeMount.TYPE_VOLUME}
    now = time.time_ns()
    return [VolumeRecord(namespace, name, name in anonymous, now, {}, {}) for name in sorted(names)]
