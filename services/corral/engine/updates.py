"""Changing a container that exists: its name, its limits, its rates, its labels."""

from contextlib import suppress

from corral.api.cgroups.v1.cgroups_pb2 import UpdateCgroupRequest
from corral.api.engine.v1.engine_pb2 import ContainerConfig, RestartPolicy, UpdateContainerRequest
from corral.api.types.v1.types_pb2 import Resources
from corral.engine import requests, store
from corral.engine.core import Core
from corral.engine.leaves import persistently
from corral.engine.networking import Networking
from corral.engine.options import check_restart_policy
from corral.engine.records import ALIVE, ContainerRecord
from corral.engine.requests import with_default_swap
from corral.rpc.context import check_id
from corral.rpc.errors import CorralError, InvalidArgument, NotFound
from corral.rpc.limits import after_change
from corral.store import Transaction, failpoint


class Updates:
    """See the module."""

    def __init__(self, core: Core, networking: Networking) -> None:
        self._core = core
        self._networking = networking

    async def rename(self, reference: str, name: str) -> ContainerRecord:
        """Raises AlreadyExists, NotFound, InvalidArgument."""
        record = self._core.resolve(reference)
        check_id(name, "container name")
        return await self._core.background.to_the_end(self._rename(record, name))

    async def _rename(self, named: ContainerRecord, name: str) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            renamed = await self._core.database.write(
                lambda tx: store.rename(tx, named.namespace, named.id, name), durable=True
            )
            if renamed.status in ALIVE:  # others find it by its new name from now on
                attach = requests.network_again(renamed, host_hostname=self._core.host.hostname)
                await persistently(lambda: self._core.leaves.endpoints.Attach(attach))
        return renamed

    async def update(self, request: UpdateContainerRequest) -> ContainerRecord:
        """Change what the request names, the rest stays; labels are laid over those there are.

        Raises what corral.cgroups.v1.Cgroups.Update and Networking.limit() raise; then nothing is changed.
        """
        check_restart_policy(request.restart)
        named = self._core.resolve(request.container)
        return await self._core.background.to_the_end(self._update(named, request))

    async def _update(self, named: ContainerRecord, request: UpdateContainerRequest) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            before = self._core.get(named.namespace, named.id)
            if request.HasField("network_rate"):
                await self._networking.limit(before, request.network_rate)
            if request.HasField("resources"):
                try:
                    await self._limit(named, request.resources)
                except CorralError:
                    if request.HasField("network_rate"):
                        await self._networking.restore(before)
                    raise
                failpoint("engine.update.after_cgroup")

            def write(tx: Transaction) -> ContainerRecord:
                config = changed(store.get(tx, named.namespace, named.id).config, request)
                store.save_config(tx, named.namespace, named.id, config)
                return store.get(tx, named.namespace, named.id)

            return await self._core.database.write(write, durable=True)

    async def _limit(self, record: ContainerRecord, resources: Resources) -> None:
        """Now, if there is a cgroup; one that is made later is made with the new limits."""
        memory = record.config.resources.memory
        if not memory.HasField("swap_bytes"):
            resources = with_default_swap(resources)
        with suppress(NotFound):
            await self._core.leaves.cgroups.Update(UpdateCgroupRequest(id=record.id, resources=resources))


def changed(config: ContainerConfig, request: UpdateContainerRequest) -> ContainerConfig:
    """`config` with the request's changes. Pure."""
    new = ContainerConfig()
    new.CopyFrom(config)
    if request.HasField("resources"):
        new.resources.CopyFrom(after_change(config.resources, request.resources))
    if request.HasField("restart"):
        if new.auto_remove and request.restart.mode > RestartPolicy.MODE_NO:
            raise InvalidArgument("a container that is removed when it ends (--rm) cannot be restarted")
        new.restart.CopyFrom(request.restart)
    for key, value in request.labels.items():
        new.labels[key] = value
    return new
