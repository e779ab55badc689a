"""Ports of a container that exists: more of them, or less, while it runs or before its next start.

    config, durably  ->  network.Publish or Unpublish  ->  the endpoint's new state

An engine that dies in between finds a config and an endpoint that differ, and asks for the same again.
"""

from collections.abc import Sequence
from contextlib import suppress

import structlog

from corral.api.engine.v1.engine_pb2 import ContainerConfig
from corral.api.network.v1.network_pb2 import (
    Endpoint,
    GetNetworkRequest,
    PortMapping,
    PublishRequest,
    UnpublishRequest,
)
from corral.engine import requests, store
from corral.engine.core import Core
from corral.engine.leaves import persistently
from corral.engine.networking import ATTACHED
from corral.engine.port_mappings import (
    agree,
    checked,
    means,
    missing,
    published_by,
    refuse_taken,
    superfluous,
    told,
    with_ports,
    with_these,
)
from corral.engine.records import ContainerRecord, Status
from corral.rpc.context import in_namespace
from corral.rpc.errors import CorralError, FailedPrecondition, NotFound, Unavailable
from corral.store import Transaction, failpoint

log = structlog.get_logger()


class Publishing:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def publish(self, reference: str, ports: Sequence[PortMapping]) -> ContainerRecord:
        """Publish more ports, all or none; those that are published already are no error.

        Raises NotFound, AlreadyExists if a port of the host is taken, InvalidArgument, FailedPrecondition if the
        container has no network of its own.
        """
        asked = checked(ports)
        record = self._core.resolve(reference)
        return await self._core.background.to_the_end(self._publish(record, asked))

    async def _publish(self, named: ContainerRecord, asked: Sequence[PortMapping]) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            record = self._changeable(named)
            published = published_by(record)
            lacking = [port for port in asked if not any(means(port, one) for one in published)]
            if not lacking:
                return record
            refuse_taken(record.name, published, lacking)
            return await self._change(record, with_ports(record, published, lacking), [*published, *lacking])

    async def unpublish(self, reference: str, ports: Sequence[PortMapping]) -> ContainerRecord:
        """Withdraw ports, all or none. Raises NotFound for a container, or a port that it does not publish."""
        named = checked(ports)
        record = self._core.resolve(reference)
        return await self._core.background.to_the_end(self._unpublish(record, named))

    async def _unpublish(self, found: ContainerRecord, named: Sequence[PortMapping]) -> ContainerRecord:
        async with self._core.locks.of((found.namespace, found.id)):
            record = self._changeable(found)
            published = published_by(record)
            for port in named:
                if not any(means(port, one) for one in published):
                    raise NotFound(
                        f"container {record.name} does not publish port {told(port)}: `corral port {record.name}` shows"
                        " what it publishes",
                        reason="PORT_NOT_PUBLISHED",
                    )
            kept = [one for one in published if not any(means(port, one) for port in named)]
            return await self._change(record, with_ports(record, kept), kept)

    def _changeable(self, named: ContainerRecord) -> ContainerRecord:
        record = self._core.get(named.namespace, named.id)
        if record.status in (Status.CREATING, Status.REMOVING) or record.endpoint is None:
            raise FailedPrecondition(f"container {record.name} is being made or removed", reason="NOT_UP")
        if not requests.attachments(record.config.network):
            raise FailedPrecondition(
                f"container {record.name} is in no network of its own ({record.config.network.mode}): its ports cannot"
                " be published",
                reason="BAD_MODE",
            )
        return record

    async def _change(
        self, record: ContainerRecord, config: ContainerConfig, ports: Sequence[PortMapping]
    ) -> ContainerRecord:
        """Write the config down and make it so; where that can't be, the old one is back."""
        assert record.endpoint is not None
        before = record.endpoint
        if record.status not in ATTACHED:
            await self._refuse_of_plugins(record)
            # Where it waits for its restart, the network has them still.
            record = await self._save(record, config, with_these(before, ports))
            return await self._withdraw_of_ended(record)
        changed = await self._save(record, config, before)
        failpoint("engine.ports.after_config")
        try:
            return await self._make_so(changed)
        except Unavailable:  # it is made so when the leaf is back
            raise
        except CorralError:
            await self._save(record, record.config, before)
            raise

    async def _refuse_of_plugins(self, record: ContainerRecord) -> None:
        """Raises FailedPrecondition, as the leaf does for one that runs: plugins of CNI publish ports once and for
        all."""
        drivers = set()
        for asked in requests.attachments(record.config.network):
            with suppress(NotFound):  # it was removed while the container did not run
                network = await self._core.leaves.networks.Get(GetNetworkRequest(name=asked.network))
                drivers.add("internal" if network.internal else network.driver)
        if "cni" in drivers and "bridge" not in drivers:
            raise FailedPrecondition(
                f"ports of container {record.name} are for CNI plugins, which publish them only when a container is"
                " made: make it anew",
                reason="PORT_LASTS",
            )

    async def _withdraw_of_ended(self, record: ContainerRecord) -> ContainerRecord:
        unpublish = self._core.leaves.endpoints.Unpublish
        with suppress(NotFound):  # after a boot there is no endpoint
            await persistently(lambda: unpublish(UnpublishRequest(endpoint_id=record.id)))
        return record

    async def _make_so(self, record: ContainerRecord) -> ContainerRecord:
        """Have the leaf publish and withdraw what makes the endpoint's ports those of the config."""
        assert record.endpoint is not None
        endpoints, endpoint = self._core.leaves.endpoints, record.endpoint
        if gone := superfluous(record):
            withdraw = UnpublishRequest(endpoint_id=record.id, ports=gone)
            endpoint = await persistently(lambda: endpoints.Unpublish(withdraw))
        if lacking := missing(record):
            add = PublishRequest(endpoint_id=record.id, ports=lacking)
            endpoint = await persistently(lambda: endpoints.Publish(add))
        failpoint("engine.ports.after_leaf")
        return await self._save(record, record.config, endpoint)

    async def _save(self, record: ContainerRecord, config: ContainerConfig, endpoint: Endpoint) -> ContainerRecord:
        def write(tx: Transaction) -> ContainerRecord:
            store.save_config(tx, record.namespace, record.id, config)
            store.save_endpoint(tx, record.namespace, record.id, endpoint)
            return store.get(tx, record.namespace, record.id)

        return await self._core.database.write(write, durable=True)

    async def settle(self) -> None:
        """Make endpoints what configs say, where the engine, or the leaf, was away in between. Raises Unavailable."""
        for record in self._core.database.read_sync(lambda view: store.containers_in(view, tuple(ATTACHED))):
            if agree(record) or (record.namespace, record.id) in self._core.being_made:
                continue
            async with self._core.locks.of((record.namespace, record.id)):
                await self._settle(record)

    async def _settle(self, found: ContainerRecord) -> None:
        record = self._core.database.read_sync(lambda view: store.find(view, found.namespace, found.id))
        if record is None or record.status not in ATTACHED or agree(record):
            return
        with in_namespace(record.namespace):
            try:
                await self._make_so(record)
            except Unavailable:
                raise
            except CorralError as e:  # another has the port by now; nobody was told that this one has it
                log.warning("ports.not_settled", container=record.id, error=str(e))
                assert record.endpoint is not None
                await self._save(record, with_ports(record, record.endpoint.ports), record.endpoint)
