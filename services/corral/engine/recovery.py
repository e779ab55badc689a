"""What the engine does when it starts, and again whenever a leaf was away: make records and leaves agree.

1. The end of tasks' journal is merged, so that exits that happened meanwhile are known as they were.
2. Rows that say CREATING are undone, rows that say REMOVING are finished. (If the machine died after a CREATING one had
   its parts, its user may know it as created: then it is.)
3. Rows are compared with tasks and cgroups: an end or a start nobody wrote down, a start that did not happen, half a
   freeze.
4. Endpoints are made what configs say, where networks or ports of one were being changed.
5. What leaves keep for the engine, but no row describes, is removed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

import structlog

from corral.api.cgroups.v1.cgroups_pb2 import DeleteCgroupRequest, ListCgroupsRequest, ThawRequest
from corral.api.images.v1.images_pb2 import ListSnapshotsRequest, RemoveSnapshotRequest
from corral.api.network.v1.network_pb2 import DetachRequest, Endpoint, GetEndpointRequest, ListEndpointsRequest
from corral.api.tasks.v1 import tasks_pb2
from corral.engine import pauses, store
from corral.engine.core import Core, Key
from corral.engine.leaves import persistently
from corral.engine.networking import Networking
from corral.engine.publishing import Publishing
from corral.engine.records import ALIVE, ContainerRecord, Status, to_ns
from corral.engine.removal import Removal
from corral.engine.requests import OWNER
from corral.engine.restarts import is_cut_short
from corral.engine.secrets import sweep as sweep_secrets
from corral.engine.volumes import sweep as sweep_volumes
from corral.rpc.blocking import run_blocking
from corral.rpc.context import in_namespace
from corral.rpc.errors import CorralError, NotFound
from corral.store import Transaction, failpoint

log = structlog.get_logger()

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0
PARALLEL = 8
# How far a time that came by a journal, as a double, may be off. No further run ends so soon.
ROUNDING_NS = 1_000_000


class _Labelled(Protocol):
    """What leaves keep for a composer."""

    @property
    def labels(self) -> Mapping[str, str]: ...


class Recovery:
    """See the module."""

    def __init__(
        self,
        core: Core,
        removal: Removal,
        networking: Networking,
        publishing: Publishing,
        catch_up: Callable[[str], Awaitable[None]],
    ) -> None:
        self._core = core
        self._networking = networking
        self._publishing = publishing
        self._removal = removal
        self._catch_up = catch_up
        self._passing: list[tuple[str, str]] = []

    async def start(self) -> None:
        """Recover now, or, if a leaf does not answer yet or fails, in the background until it is done."""
        self._passing = self._core.database.read_sync(pauses.everything)
        self._found_ended = self._records(Status.EXITED)
        await run_blocking(sweep_volumes, self._core)
        await run_blocking(sweep_secrets, self._core)
        await run_blocking(self._core.trash.empty_or_report)
        try:
            await self.run()
        except (CorralError, OSError) as e:
            log.warning("recovery.waits", error=str(e))
            self._core.background.spawn_endless(self._until_done())

    async def _until_done(self) -> None:
        delay_s = RETRY_FIRST_S
        while True:
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_MOST_S)
            try:
                return await self.run()
            except (CorralError, OSError) as e:
                log.info("recovery.retry", error=str(e), next_s=delay_s)

    async def run(self) -> None:
        """All five steps. Raises Unavailable, OSError on a full disk, and may then be called again."""
        if self._core.database.read_sync(store.perhaps_created):
            for record in await self._core.database.write(store.keep_created):
                log.info("recovery.created", container=record.id)
        await self._catch_up("tasks")
        await self._finish_halves()
        await self.compare_tasks()
        await self._compare_frozen()
        await self._resume_passing()
        await self._settle_networks()
        await self._sweep()
        for record in self._found_ended:
            now = self._find((record.namespace, record.id))
            if now == record:  # nobody has done anything with it meanwhile
                self._core.on_found_ended(now)
        self._found_ended = []
        self._go_on_with_restarts(at_boot=True)

    async def after_outage(self, origin: str) -> None:
        """A leaf was away and its journal is merged again: ask it what no event told. Raises Unavailable."""
        if origin == "tasks":
            await self.compare_tasks()
            self._go_on_with_restarts(at_boot=False)
        elif origin == "cgroups":
            await self._compare_frozen()
        elif origin == "network":
            await self._settle_networks()
        await self._finish_halves()

    def _go_on_with_restarts(self, *, at_boot: bool) -> None:
        for record in self._records(Status.CREATED):
            if is_cut_short(record):
                self._core.on_cut_short(record, at_boot)

    async def _settle_networks(self) -> None:
        await self._networking.settle()
        await self._publishing.settle()

    async def _finish_halves(self) -> None:
        halves = self._records(Status.CREATING, Status.REMOVING)
        await _each(halves, self.finish)

    async def finish(self, record: ContainerRecord) -> None:
        """Remove a container that was made, or removed, only in part. Raises CorralError."""
        key = (record.namespace, record.id)
        async with self._core.locks.of(key):
            now = self._find(key)
            if now is None or key in self._core.being_made:
                return
            if now in self._core.database.read_sync(store.perhaps_created):  # and still is to be kept: see run()
                return
            volumes = self._core.database.read_sync(lambda view: store.is_removing_volumes(view, *key))
            if now.status in (Status.CREATING, Status.REMOVING):
                log.info("recovery.removed", container=now.id, was=now.status.word)
                with in_namespace(now.namespace):
                    await self._removal.remove(now, volumes=volumes or now.status is Status.CREATING)

    def _records(self, *statuses: Status) -> list[ContainerRecord]:
        found = self._core.database.read_sync(lambda view: store.containers_in(view, statuses))
        return [record for record in found if (record.namespace, record.id) not in self._core.being_made]

    # Comparing

    async def compare_tasks(self) -> None:
        """Take over what tasks knows and we do not. Raises Unavailable."""
        tasks = await self._core.leaves.tasks.List(tasks_pb2.ListTasksRequest(all_namespaces=True))
        states = {(task.labels["corral.namespace"], task.id): task for task in tasks.tasks if is_ours(task.labels)}
        doubtful = [
            record
            for record in self._records(Status.CREATED, Status.EXITED, *ALIVE)
            if not agree(record, states.get((record.namespace, record.id)))
        ]
        await _each(doubtful, self.settle)

    async def settle(self, record: ContainerRecord) -> None:
        """Under the container's lock, so that no start is on its way, ask again and write down what is."""
        async with self._core.locks.of((record.namespace, record.id)):
            now = self._find((record.namespace, record.id))
            if now is None:
                return
            with in_namespace(now.namespace):
                try:
                    task = await self._core.leaves.tasks.Get(tasks_pb2.GetTaskRequest(id=now.id))
                except NotFound:
                    task = None
            if agree(now, task):
                return
            if now.status is Status.EXITED and task is not None:
                await self._settle_new_task(now, task)
            elif task is None:
                log.warning("recovery.task_lost", container=now.id)
                await self._core.record_lost(now, "its task was lost; the exit code is not known")
            elif task.status == tasks_pb2.STATUS_STOPPED:
                await self._core.record_exit(now, task.exit)
            elif now.status is Status.CREATED:  # it was started, and the disk was too full to write that down
                running = now._replace(status=Status.RUNNING, started_ns=to_ns(task.started_at))
                await self._core.database.write(lambda tx: store.save_started(tx, running, by_user=False))
                self._core.on_found_running(running)
            elif now.status is Status.RUNNING:  # we died between the intent to start and the start
                log.info("recovery.not_started", container=now.id)
                await self._core.database.write(lambda tx: store.set_status(tx, now.namespace, now.id, Status.CREATED))

    async def _settle_new_task(self, record: ContainerRecord, task: tasks_pb2.Task) -> None:
        """We died on the way from the new task of an ended container to the row that tells of its start."""
        with in_namespace(record.namespace):
            if task.status == tasks_pb2.STATUS_CREATED:  # a next start makes one
                log.info("recovery.not_started", container=record.id)
                await self._core.leaves.tasks.Delete(tasks_pb2.DeleteTaskRequest(id=record.id, force=True))
                return
            endpoint = await self._endpoint(record.id)
        log.info("recovery.was_started", container=record.id)
        started = record._replace(
            status=Status.RUNNING,
            pid=task.pid,
            started_ns=to_ns(task.started_at),
            finished_ns=0,
            exit=None,
            endpoint=endpoint,
        )

        def write(tx: Transaction) -> None:
            store.save_started(tx, started, by_user=False)
            store.announce_started(tx, started)

        await self._core.database.write(write)
        if task.status == tasks_pb2.STATUS_STOPPED:
            await self._core.record_exit(started, task.exit)
        else:
            self._core.on_found_running(started)

    async def _endpoint(self, id_: str) -> Endpoint | None:
        try:
            return await self._core.leaves.endpoints.Get(GetEndpointRequest(endpoint_id=id_))
        except NotFound:
            return None

    async def _compare_frozen(self) -> None:
        """A container is frozen if and only if its row says PAUSED; else we died between the two."""
        response = await self._core.leaves.cgroups.List(ListCgroupsRequest(all_namespaces=True))
        frozen = {
            (cgroup.labels["corral.namespace"], cgroup.id): cgroup.frozen
            for cgroup in response.cgroups
            if is_ours(cgroup.labels)
        }
        for record in self._records(*ALIVE):
            key = (record.namespace, record.id)
            if frozen.get(key, False) == (record.status is Status.PAUSED):
                continue
            await self.settle_frozen(record, frozen=frozen.get(key, False))

    async def settle_frozen(self, record: ContainerRecord, *, frozen: bool) -> None:
        """Make a container's row and its cgroup agree about whether it is paused. Raises Unavailable."""
        key = (record.namespace, record.id)
        async with self._core.locks.of(key):
            if (now := self._find(key)) is not None:
                await self._settle_frozen_now(now, frozen=frozen)

    async def _settle_frozen_now(self, record: ContainerRecord, *, frozen: bool) -> None:
        if record.status is Status.RUNNING and frozen:  # nobody was told that it is paused
            with in_namespace(record.namespace):
                await persistently(lambda: self._core.leaves.cgroups.Thaw(ThawRequest(id=record.id)))
        elif record.status is Status.PAUSED and not frozen:
            await self._core.database.write(
                lambda tx: store.set_status(tx, record.namespace, record.id, Status.RUNNING)
            )

    async def _resume_passing(self) -> None:
        """What an earlier engine had paused for a moment, and did not live to resume. Raises Unavailable."""
        while self._passing:
            key = self._passing[-1]
            async with self._core.locks.of(key):
                if (now := self._find(key)) is not None and now.status is Status.PAUSED:
                    await self._resume(now)
            self._passing.pop()

    async def _resume(self, record: ContainerRecord) -> None:
        with in_namespace(record.namespace):
            await persistently(lambda: self._core.leaves.cgroups.Thaw(ThawRequest(id=record.id)))

        def write(tx: Transaction) -> None:
            tx.journal("container.unpaused", record.id, {"name": record.name}, namespace=record.namespace)
            pauses.forget(tx, record.namespace, record.id)
            store.set_status(tx, record.namespace, record.id, Status.RUNNING)

        await self._core.database.write(write)

    # Sweeping

    async def _sweep(self) -> None:
        """Remove what leaves keep for the engine without a row. Rows come first and go last: nothing new is caught."""
        leaves = self._core.leaves
        tasks = await leaves.tasks.List(tasks_pb2.ListTasksRequest(all_namespaces=True))
        for key in self.strays(tasks.tasks):
            await self.sweep_one("task", key, leaves.tasks.Delete, tasks_pb2.DeleteTaskRequest(id=key[1], force=True))
        cgroups = await leaves.cgroups.List(ListCgroupsRequest(all_namespaces=True))
        for key in self.strays(cgroups.cgroups):
            await self.sweep_one("cgroup", key, leaves.cgroups.Delete, DeleteCgroupRequest(id=key[1]))
        endpoints = await leaves.endpoints.List(ListEndpointsRequest(all_namespaces=True))
        for key in self.strays(endpoints.endpoints):
            await self.sweep_one("endpoint", key, leaves.endpoints.Detach, DetachRequest(endpoint_id=key[1]))
        for namespace in self._core.database.read_sync(store.namespaces):
            with in_namespace(namespace):
                snapshots = await leaves.snapshots.List(ListSnapshotsRequest())
            strays = set(self.strays(snapshots.snapshots))
            for snapshot in snapshots.snapshots:  # a container may have several
                if is_ours(snapshot.labels) and (key := (namespace, snapshot.labels["corral.container"])) in strays:
                    request = RemoveSnapshotRequest(key=snapshot.key)
                    await self.sweep_one("snapshot", key, leaves.snapshots.Remove, request)

    def strays(self, resources: Iterable[_Labelled]) -> list[Key]:
        """Those of the engine's own that no row describes."""
        ours = [
            (labels["corral.namespace"], labels["corral.container"])
            for labels in (resource.labels for resource in resources)
            if is_ours(labels)
        ]
        return [key for key in ours if self._find(key) is None]

    def _find(self, key: Key) -> ContainerRecord | None:
        return self._core.database.read_sync(lambda view: store.find(view, *key))

    async def sweep_one(self, what: str, key: Key, call: Callable[..., Awaitable[object]], request: object) -> None:
        """Have a leaf remove what it keeps for a container that is not there. Raises CorralError."""
        if self._find(key) is not None:  # made since we looked
            return
        failpoint("engine.recovery.before_sweep")
        log.warning("recovery.swept", what=what, namespace=key[0], container=key[1])
        with in_namespace(key[0]):
            await call(request)


def is_ours(labels: Mapping[str, str]) -> bool:
    """Whether the engine has had it made."""
    return labels.get("corral.owner") == OWNER


def agree(record: ContainerRecord, task: tasks_pb2.Task | None) -> bool:
    """Whether row and task say the same. A CREATED container may lack its task: a start makes it again."""
    if record.status is Status.CREATED:
        return task is None or task.status == tasks_pb2.STATUS_CREATED
    if record.status in ALIVE:
        return task is not None and task.status == tasks_pb2.STATUS_RUNNING
    if task is None:
        return True
    ended_later = to_ns(task.exit.exited_at) - record.finished_ns > ROUNDING_NS
    # Of a start that fails, the engine tells before the shim does.
    is_later_run = ended_later and to_ns(task.created_at) > record.finished_ns
    return task.status == tasks_pb2.STATUS_STOPPED and not is_later_run


async def _each(records: Iterable[ContainerRecord], act: Callable[[ContainerRecord], Awaitable[None]]) -> None:
    """Some at a time. Raises the first error after all have been tried."""
    limit = asyncio.Semaphore(PARALLEL)

    async def one(record: ContainerRecord) -> None:
        async with limit:
            await act(record)

    for outcome in await asyncio.gather(*map(one, records), return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
