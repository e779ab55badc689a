"""Networks of a container that exists: one more, or one less, while it runs or before its next start.

    config, durably  ->  network.Attach, which makes it so  ->  the endpoint's new state

What does not run is attached by its next start, but leaves a network at once: nobody is to find that in use by it.
An engine that dies in between finds a config and an endpoint that differ, and asks for the same again.
"""

from collections.abc import Sequence
from contextlib import suppress

import structlog

from corral.api.engine.v1.engine_pb2 import ContainerConfig, NetworkRate
from corral.api.network.v1.network_pb2 import (
    DetachRequest,
    DisconnectRequest,
    GetNetworkRequest,
    Interface,
    NetworkAttachment,
)
from corral.engine import requests, store
from corral.engine.core import Core
from corral.engine.leaves import persistently
from corral.engine.port_mappings import with_these
from corral.engine.records import ALIVE, ContainerRecord, Status
from corral.rpc.context import in_namespace
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from corral.store import Transaction, failpoint

log = structlog.get_logger()

MIN_RATE_BPS, MAX_RATE_BPS = 8_000, 10**12
ATTACHED = ALIVE | {Status.CREATED}
"""Of the others an endpoint may be there, and is made to fit by their next start."""


class Networking:
    """See the module."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def connect(self, reference: str, attachment: NetworkAttachment) -> ContainerRecord:
        """Put a container into one more network; the same call again is no error.

        Raises NotFound, AlreadyExists if it is in there in another way, FailedPrecondition if it has no network of its
        own or the address is taken, InvalidArgument, ResourceExhausted if there is no address left.
        """
        record = self._core.resolve(reference)
        return await self._core.background.to_the_end(self._connect(record, attachment))

    async def _connect(self, named: ContainerRecord, attachment: NetworkAttachment) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            record = self._own_network(named)
            wanted = NetworkAttachment()
            wanted.CopyFrom(attachment)
            wanted.network = await self._name_of(attachment.network)
            asked = list(requests.attachments(record.config.network))
            known = await self._find(asked, wanted.network)
            if known is None:
                return await self._change(record, with_networks(record.config, [*asked, wanted]))
            known.network = wanted.network
            if known == wanted:
                return await self._change(record, record.config)
            raise AlreadyExists(
                f"container {record.name} is in network {wanted.network!r} already: disconnect it first",
                reason="CONNECTED",
            )

    async def disconnect(self, reference: str, network: str) -> ContainerRecord:
        """Take a container out of a network. Raises NotFound, FailedPrecondition if a published port would lead
        nowhere."""
        record = self._core.resolve(reference)
        return await self._core.background.to_the_end(self._disconnect(record, network))

    async def _disconnect(self, named: ContainerRecord, network: str) -> ContainerRecord:
        async with self._core.locks.of((named.namespace, named.id)):
            record = self._own_network(named)
            try:
                name = await self._name_of(network)
            except NotFound:  # it was removed while the container did not run
                name = network
            asked = list(requests.attachments(record.config.network))
            known = await self._find(asked, name)
            if known is None:
                raise NotFound(f"container {record.name} is not in network {name!r}", reason="NOT_CONNECTED")
            left = [one for one in asked if one is not known]
            if not left and (record.config.network.ports or record.config.network.publish_all):
                raise FailedPrecondition(
                    f"ports of container {record.name} are published by network {name!r}: connect it to another network"
                    " first",
                    reason="PORT_UNREACHABLE",
                )
            changed = await self._change(record, with_networks(record.config, left))
            return changed if changed.status in ATTACHED else await self._leave(record, changed, name)

    async def limit(self, named: ContainerRecord, rate: NetworkRate) -> ContainerRecord:
        """Limit what it receives and sends in each of its networks; its lock is held.

        Raises FailedPrecondition if it is in none, InvalidArgument for a rate that one of them cannot have.
        """
        check_rate(rate)
        record = self._own_network(named)
        asked = requests.attachments(record.config.network)
        for one in asked:
            one.receive_bps, one.send_bps = rate.receive_bps, rate.send_bps
        if not asked:
            raise FailedPrecondition(f"container {record.name} is in no network: connect it to one", reason="BAD_MODE")
        return await self._change(record, with_networks(record.config, asked))

    async def restore(self, before: ContainerRecord) -> None:
        """Undo what was changed since; its lock is held."""
        await self._change(before, before.config)

    def _own_network(self, named: ContainerRecord) -> ContainerRecord:
        record = self._core.get(named.namespace, named.id)
        if record.status is Status.REMOVING:
            raise FailedPrecondition(f"container {record.name} is being removed", reason="REMOVING")
        kind, _, rest = record.config.network.mode.partition(":")
        if kind == "host" or rest:
            raise FailedPrecondition(
                f"container {record.name} has no network of its own ({record.config.network.mode}): it can be in no"
                " other",
                reason="BAD_MODE",
            )
        return record

    async def _name_of(self, network: str) -> str:
        found = await self._core.leaves.networks.Get(GetNetworkRequest(name=network))
        return found.name

    async def _find(self, asked: Sequence[NetworkAttachment], name: str) -> NetworkAttachment | None:
        """The one that means a network, which it may call by its id."""
        for one in asked:
            if one.network == name:
                return one
        for one in asked:
            with suppress(NotFound):  # that one was removed while the container did not run
                if await self._name_of(one.network) == name:
                    return one
        return None

    async def _change(self, record: ContainerRecord, config: ContainerConfig) -> ContainerRecord:
        """Write the config down and make it so; where that can't be, the old one is back."""
        changed = await self._save(record, config)
        failpoint("engine.networks.after_config")
        if record.status not in ATTACHED:
            return changed
        try:
            return await self._attach(changed)
        except Unavailable:  # it is made so when the leaf is back
            raise
        except CorralError:
            await self._save(record, record.config)
            raise

    async def _leave(self, before: ContainerRecord, record: ContainerRecord, network: str) -> ContainerRecord:
        """Take the endpoint of one that does not run out of a network; where that can't be, the old config is back."""
        if record.endpoint is None:
            return record
        endpoints = self._core.leaves.endpoints
        try:
            left = await persistently(
                lambda: endpoints.Disconnect(DisconnectRequest(endpoint_id=record.id, network=network))
            )
        except NotFound:  # it was never made so, or is done already
            return record
        except FailedPrecondition as e:
            if e.reason == "NOT_UP":  # of an earlier boot: the next start would make it anew
                await persistently(lambda: endpoints.Detach(DetachRequest(endpoint_id=record.id)))
                return record
            await self._save(record, before.config)
            raise
        # The ports that it had are gone with its end; those that it gets again are kept.
        endpoint = with_these(left, record.endpoint.ports)

        def write(tx: Transaction) -> ContainerRecord:
            store.save_endpoint(tx, record.namespace, record.id, endpoint)
            return store.get(tx, record.namespace, record.id)

        return await self._core.database.write(write)

    async def _save(self, record: ContainerRecord, config: ContainerConfig) -> ContainerRecord:
        def write(tx: Transaction) -> ContainerRecord:
            store.save_config(tx, record.namespace, record.id, config)
            return store.get(tx, record.namespace, record.id)

        return await self._core.database.write(write, durable=True)

    async def _attach(self, record: ContainerRecord) -> ContainerRecord:
        request = requests.network_again(record, host_hostname=self._core.host.hostname)
        endpoint = await persistently(lambda: self._core.leaves.endpoints.Attach(request))
        failpoint("engine.networks.after_attach")

        def write(tx: Transaction) -> ContainerRecord:
            store.save_endpoint(tx, record.namespace, record.id, endpoint)
            return store.get(tx, record.namespace, record.id)

        return await self._core.database.write(write)

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
                await self._attach(record)
            except Unavailable:
                raise
            except CorralError as e:
                log.warning("networks.not_settled", container=record.id, error=str(e))


def check_rate(rate: NetworkRate) -> None:
    """As network does, which is not asked before the next start of what does not run. Raises InvalidArgument."""
    for bits_per_s in filter(None, (rate.receive_bps, rate.send_bps)):
        if not MIN_RATE_BPS <= bits_per_s <= MAX_RATE_BPS:
            raise InvalidArgument(
                f"a rate of {bits_per_s} bits per second is not between {MIN_RATE_BPS} and {MAX_RATE_BPS}",
                reason="BAD_RATE",
            )


def agree(record: ContainerRecord) -> bool:
    """Whether its endpoint is in the networks that its config names, with the rates it names; a network that it names
    by its id differs. Pure."""
    if record.endpoint is None:
        return True
    asked, has = requests.attachments(record.config.network), record.endpoint.interfaces
    return sorted(map(_way, asked)) == sorted(map(_way, has))


def _way(one: NetworkAttachment | Interface) -> tuple[str, int, int]:
    return one.network, one.receive_bps, one.send_bps


def with_networks(config: ContainerConfig, attachments: Sequence[NetworkAttachment]) -> ContainerConfig:
    """`config` with other networks; without any its mode is "none". Pure."""
    new = ContainerConfig()
    new.CopyFrom(config)
    new.network.mode = attachments[0].network if attachments else "none"
    del new.network.attachments[:]
    new.network.attachments.extend(attachments)
    return new
