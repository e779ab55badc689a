"""Giving a container back: every leaf's part in the reverse order of making, then its row.

    row REMOVING -> tasks.Delete -> images.Remove || network.Detach || cgroups.Delete -> volumes, log, row

Each step is idempotent, so it is begun again wherever it stopped: by the next call, by a retry, or at the next start.
"""

import asyncio
from contextlib import suppress

import structlog

from corral.api.cgroups.v1.cgroups_pb2 import DeleteCgroupRequest, ThawRequest
from corral.api.images.v1.images_pb2 import RemoveSnapshotRequest
from corral.api.network.v1.network_pb2 import DetachRequest
from corral.api.tasks.v1.tasks_pb2 import DeleteTaskRequest, KillRequest
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine import image_mounts, store, volume_rows
from corral.engine.absence import RETURN_S
from corral.engine.core import Core, all_ended, apply_exit, lost_exit
from corral.engine.leaves import persistently
from corral.engine.records import ALIVE, ContainerRecord, Status
from corral.engine.volumes import remove_unknown
from corral.rpc.context import in_namespace
from corral.rpc.errors import CorralError, FailedPrecondition, NotFound
from corral.store import Transaction, failpoint

log = structlog.get_logger()

SIGKILL = 9
RETRY_FIRST_S, RETRY_MOST_S = 0.5, 30.0
# How long a container that removes itself waits for clients that still read its output, or will be back for it.
ATTACHED_GRACE_S = RETURN_S + 10.0


class Removal:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def delete(self, reference: str, *, force: bool, volumes: bool) -> ContainerRecord:
        """Remove a container that a user named; returns its last record.

        Raises NotFound, FailedPrecondition while it runs (unless force), CorralError.
        """
        named = self._core.resolve(reference)
        return await self._core.background.to_the_end(self._delete(named, force=force, volumes=volumes))

    async def _delete(self, named: ContainerRecord, *, force: bool, volumes: bool) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            record = self._core.get(named.namespace, named.id)
            if record.status is Status.CREATING:
                raise FailedPrecondition(
                    f"container {record.name} is being created: wait until that has ended", reason="BAD_STATUS"
                )
            if self._core.is_restarting(record) and not force:
                raise FailedPrecondition(
                    f"container {record.name} is restarting: stop it first, or remove it by force", reason="RESTARTING"
                )
            self._core.forget_backoff((named.namespace, named.id))
            status = await self._end(record, force=force) if record.status in ALIVE else None
            return await self._remove(record, volumes=volumes, status=status)

    async def _end(self, record: ContainerRecord, *, force: bool) -> ExitStatus:
        """Delete the task of a container that runs as far as we know. Without force it must have ended meanwhile."""
        tasks = self._core.leaves.tasks
        if force and record.status is Status.PAUSED:
            await self._kill_frozen(record)
        try:
            response = await persistently(lambda: tasks.Delete(DeleteTaskRequest(id=record.id, force=force)))
        except FailedPrecondition as e:
            raise FailedPrecondition(
                f"container {record.name} is {record.status.word}: stop it first, or remove it by force",
                reason="RUNNING",
                metadata={"container": record.id},
            ) from e
        failpoint("engine.delete.after_task")
        return response.exit if response.HasField("exit") else lost_exit("its task was gone when it was removed")

    async def _kill_frozen(self, record: ContainerRecord) -> None:
        """A frozen process takes its SIGKILL when it is thawed, before it runs one more instruction."""
        with suppress(FailedPrecondition, NotFound):  # it has ended
            await self._core.leaves.tasks.Kill(KillRequest(id=record.id, signal=SIGKILL, all=True))
        await persistently(lambda: self._core.leaves.cgroups.Thaw(ThawRequest(id=record.id)))

    async def remove(self, record: ContainerRecord, *, volumes: bool) -> None:
        """Remove a container whose making was begun; its lock is not needed, for nobody else can name it yet."""
        await self._remove(record, volumes=volumes)

    async def _remove(
        self, record: ContainerRecord, *, volumes: bool, status: ExitStatus | None = None
    ) -> ContainerRecord:
        """Give every part back, then forget it; returns its last record.

        Raises CorralError; the row then says REMOVING.
        `status`: its task is gone already, and how it ended is still to be written down.
        """
        leaves, id_ = self._core.leaves, record.id

        async def end_task() -> None:
            if status is None:
                await persistently(lambda: leaves.tasks.Delete(DeleteTaskRequest(id=id_, force=True)))

        async def detach() -> None:
            await persistently(lambda: leaves.endpoints.Detach(DetachRequest(endpoint_id=id_)))

        async def delete_cgroup() -> None:
            await persistently(lambda: leaves.cgroups.Delete(DeleteCgroupRequest(id=id_)))

        async def remove_snapshot() -> None:
            # That it is being removed must be on disk before that is gone which no start could make again. And what is
            # still mounted is in use.
            await all_ended(on_disk, task_gone)
            failpoint("engine.delete.after_intent")
            for key in (id_, *image_mounts.keys(record.config, id_)):
                request = RemoveSnapshotRequest(key=key)
                await persistently(lambda request=request: leaves.snapshots.Remove(request))  # type: ignore[misc]
                failpoint("engine.delete.after_tree")

        last = await self._intend(record, status, volumes=volumes)
        on_disk = self._core.background.spawn(self._put_on_disk(record))
        task_gone = self._core.background.spawn(end_task())
        if record.status is not Status.EXITED:  # what lives uses its cgroup and its network
            await all_ended(task_gone)
        # The one whose work is done by the kernel comes first.
        await all_ended(delete_cgroup(), remove_snapshot(), detach())
        self._core.trash.throw(self._core.container_directory(record))
        failpoint("engine.delete.after_parts")
        removed = await self._core.database.write(lambda tx: _forget(tx, last, volumes=volumes))
        failpoint("engine.delete.after_row")
        for name in removed:
            try:
                await remove_unknown(self._core, (record.namespace, name))
            except OSError as e:  # it is busy, say: the daemon's next start comes to it again
                log.warning("volume.not_removed", volume=name, error=str(e))
        self._core.watch.tell_removal((record.namespace, record.id), last.exit)
        return last

    async def _intend(self, record: ContainerRecord, status: ExitStatus | None, *, volumes: bool) -> ContainerRecord:
        """Write down how it ended, if that is news, and that it is being removed."""

        def write(tx: Transaction) -> ContainerRecord:
            if status is not None:
                apply_exit(tx, record.namespace, record.id, status, pid=record.pid)
            found = store.find(tx, record.namespace, record.id)
            if found is None or found.status is Status.REMOVING:
                return found or record
            store.set_removing(tx, found, volumes=volumes)
            return found

        if record.status is Status.CREATING:  # which the next start would undo as well
            return record
        last = await self._core.database.write(write)
        if status is not None:
            self._core.watch.tell_exit((record.namespace, record.id), last.exit or status)
        return last

    async def _put_on_disk(self, record: ContainerRecord) -> None:
        """That it is being removed. Raises OSError on a full disk."""
        failpoint("engine.delete.before_flush")
        if record.status is Status.CREATING:  # which the next start would keep after a power loss
            await self._core.database.write(lambda tx: store.forget_parts(tx, record))
        await self._core.database.persist()

    def postpone(self, record: ContainerRecord) -> None:
        """Try again in the background until it is removed: for what nobody else would call again."""
        self._core.background.spawn_endless(self._until_removed(record))

    async def _until_removed(self, record: ContainerRecord) -> None:
        delay_s = RETRY_FIRST_S
        while True:
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_MOST_S)
            try:
                with in_namespace(record.namespace):
                    async with self._core.locks.of((record.namespace, record.id)):
                        if self._is_there(record):
                            await self._remove(record, volumes=True)
                return
            except (CorralError, OSError) as e:
                log.info("removal.retry", container=record.id, error=str(e), next_s=delay_s)

    def _is_there(self, record: ContainerRecord) -> bool:
        """Whether nobody else has removed it meanwhile. Another one with the same id must not go in its place."""
        now = self._core.database.read_sync(lambda view: store.find(view, record.namespace, record.id))
        return now is not None and now.created_ns == record.created_ns

    def remove_when_read(self, record: ContainerRecord) -> None:
        """Remove a container that wants it (--rm), once its last clients have read its output."""
        self._core.background.spawn(self._remove_when_read(record))

    async def _remove_when_read(self, record: ContainerRecord) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(ATTACHED_GRACE_S):
                while readers := self._core.attached.get((record.namespace, record.id)):
                    await asyncio.wait(set(readers))
        if self._core.is_stopping:
            return  # those whom an upgrade has sent away come back to the next program, which finds it ended
        try:
            with in_namespace(record.namespace):
                await self._delete(record, force=True, volumes=True)
        except NotFound:
            pass
        except (CorralError, OSError) as e:
            log.warning("auto_remove.postponed", container=record.id, error=str(e))
            self.postpone(record)


def _forget(tx: Transaction, record: ContainerRecord, *, volumes: bool) -> list[str]:
    """Delete the row; returns the anonymous volumes that went with it."""
    removed = volume_rows.delete_anonymous_volumes(tx, record.namespace, record.id) if volumes else []
    store.delete_container(tx, record)
    return removed
