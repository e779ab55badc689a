"""The whole installation checked: every leaf by itself, then the engine's records against what the leaves have.

The leaves come first, since what one of them puts right may be all that a container lacks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from corral.api.cgroups.v1.cgroups_pb2 import DeleteCgroupRequest, ListCgroupsRequest
from corral.api.images.v1.images_pb2 import ListSnapshotsRequest, RemoveSnapshotRequest, Snapshot
from corral.api.network.v1.network_pb2 import DetachRequest, ListEndpointsRequest
from corral.api.tasks.v1.tasks_pb2 import DeleteTaskRequest, ListTasksRequest
from corral.api.types.v1.types_pb2 import CheckRequest, CheckResponse, Finding
from corral.engine import image_mounts, requests, store
from corral.engine.checking_files import FileChecker
from corral.engine.core import Core, Key
from corral.engine.records import ALIVE, ContainerRecord, Status
from corral.engine.recovery import Recovery, agree, is_ours
from corral.rpc.checking import Found, check
from corral.rpc.context import in_namespace

HALVES = (Status.CREATING, Status.REMOVING)
WHOLE = (Status.CREATED, Status.EXITED, *ALIVE)


class Checker:
    """See the module."""

    def __init__(self, core: Core, recovery: Recovery) -> None:
        self._core = core
        self._recovery = recovery
        self._files = FileChecker(core)

    async def check(self, *, repair: bool, deep: bool = False) -> list[Finding]:
        """Of all namespaces; deep: with the content of all blobs. Raises Unavailable if a leaf does not answer."""
        leaves = self._core.leaves
        found: list[Finding] = []
        images = await leaves.images.Check(CheckRequest(repair=repair, deep=deep))
        found += images.findings
        for leaf in (leaves.cgroups, leaves.networks, leaves.tasks):
            response: CheckResponse = await leaf.Check(CheckRequest(repair=repair))
            found += response.findings
        # What images cannot tell, or has yet to find again, must not be made anew for containers.
        trees_known = all(finding.repaired for finding in images.findings)
        own = await check("engine", lambda: self._look(trees_known=trees_known), repair=repair)
        return found + list(own.findings)

    async def _look(self, *, trees_known: bool) -> Sequence[Found]:
        found = await self._strays()
        records = self._records(*HALVES)
        found += [self._half(record) for record in records]
        found += await self._tasks()
        found += await self._cgroups()
        if trees_known:
            found += await self._snapshots()
        found += await self._files.look()
        return found

    def _records(self, *statuses: Status) -> list[ContainerRecord]:
        found = self._core.database.read_sync(lambda view: store.containers_in(view, statuses))
        return [record for record in found if (record.namespace, record.id) not in self._core.being_made]

    def _half(self, record: ContainerRecord) -> Found:
        was = "made" if record.status is Status.CREATING else "removed"
        return Found(
            _name(record),
            f"was {was} only in part",
            "repair removes what is left of it",
            partial(self._recovery.finish, record),
        )

    # What leaves keep for containers that are not there

    async def _strays(self) -> list[Found]:
        leaves = self._core.leaves
        tasks, cgroups, endpoints = await asyncio.gather(
            leaves.tasks.List(ListTasksRequest(all_namespaces=True)),
            leaves.cgroups.List(ListCgroupsRequest(all_namespaces=True)),
            leaves.endpoints.List(ListEndpointsRequest(all_namespaces=True)),
        )
        snapshots = [snapshot for listed in (await self._listed_snapshots()).values() for snapshot in listed.values()]
        strays = self._recovery.strays
        found = [
            self._stray("task", key, leaves.tasks.Delete, DeleteTaskRequest(id=key[1], force=True))
            for key in strays(tasks.tasks)
        ]
        found += [
            self._stray("cgroup", key, leaves.cgroups.Delete, DeleteCgroupRequest(id=key[1]))
            for key in strays(cgroups.cgroups)
        ]
        found += [
            self._stray("endpoint", key, leaves.endpoints.Detach, DetachRequest(endpoint_id=key[1]))
            for key in strays(endpoints.endpoints)
        ]
        ownerless = set(strays(snapshots))
        found += [
            self._stray("snapshot", key, leaves.snapshots.Remove, RemoveSnapshotRequest(key=snapshot.key))
            for snapshot in snapshots  # a container may have several
            if is_ours(snapshot.labels)
            and (key := (snapshot.labels["corral.namespace"], snapshot.labels["corral.container"])) in ownerless
        ]
        return found

    def _stray(self, what: str, key: Key, call: Callable[..., Awaitable[object]], request: object) -> Found:
        return Found(
            f"{what} {key[0]}/{key[1]}",
            "belongs to no container",
            "repair removes it",
            partial(self._recovery.sweep_one, what, key, call, request),
        )

    async def _listed_snapshots(self) -> Mapping[str, Mapping[str, Snapshot]]:
        """Those of each namespace, by key."""
        found: dict[str, dict[str, Snapshot]] = {}
        for namespace in self._core.database.read_sync(store.namespaces):
            with in_namespace(namespace):
                listed = await self._core.leaves.snapshots.List(ListSnapshotsRequest())
            found[namespace] = {snapshot.key: snapshot for snapshot in listed.snapshots}
        return found

    # What containers have

    async def _tasks(self) -> list[Found]:
        listed = await self._core.leaves.tasks.List(ListTasksRequest(all_namespaces=True))
        tasks = _by_container(listed.tasks)
        return [
            Found(
                _name(record),
                f"is {record.status.word} by its record, but not by its task",
                "repair writes down what is",
                partial(self._recovery.settle, record),
            )
            for record in self._records(*WHOLE)
            if not agree(record, tasks.get((record.namespace, record.id)))
        ]

    async def _cgroups(self) -> list[Found]:
        listed = await self._core.leaves.cgroups.List(ListCgroupsRequest(all_namespaces=True))
        cgroups = _by_container(listed.cgroups)
        found = []
        for record in self._records(*ALIVE):
            cgroup = cgroups.get((record.namespace, record.id))
            if cgroup is None:
                found.append(Found(_name(record), "has lost its cgroup and runs without limits", "restart it"))
            elif cgroup.frozen != (record.status is Status.PAUSED):
                problem = f"is {record.status.word} by its record, but not by its cgroup"
                repair = partial(self._recovery.settle_frozen, record, frozen=cgroup.frozen)
                found.append(Found(_name(record), problem, "repair makes them agree", repair))
        return found

    async def _snapshots(self) -> list[Found]:
        listed = await self._listed_snapshots()
        return [
            Found(
                _name(record),
                f"has lost the tree of the image that is mounted at {mount.target}",
                "remove it, and make it again",
            )
            for record in self._records(*WHOLE)
            for key, mount in image_mounts.keys(record.config, record.id).items()
            if key not in listed.get(record.namespace, {})
        ] + [
            Found(
                _name(record),
                "has lost its snapshot",
                "repair makes an empty one on its image: what was written to it is lost",
                partial(self._prepare, record),
            )
            for record in self._records(*WHOLE)
            if record.id not in listed.get(record.namespace, {})
        ]

    async def _prepare(self, record: ContainerRecord) -> None:
        """On the very image that it had, whatever has its name now."""
        request = requests.snapshot(record.config, record.namespace, record.id)
        if record.image_id:
            request.image = record.image_id
        async with self._core.locks.of((record.namespace, record.id)):
            with in_namespace(record.namespace):
                await self._core.leaves.snapshots.Prepare(request)


def _name(record: ContainerRecord) -> str:
    return f"container {record.namespace}/{record.name}"


def _by_container(resources: Sequence[Any]) -> dict[Key, Any]:
    """Those of the engine's own."""
    return {
        (resource.labels["corral.namespace"], resource.labels["corral.container"]): resource
        for resource in resources
        if is_ours(resource.labels)
    }
