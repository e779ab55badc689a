"""Containers attached to networks of CNI: ADD, DEL, CHECK, STATUS and GC of the whole chain.

    ADD   row without a result  ->  plugins in order, each told what the last has made  ->  result in the row, durably
    DEL   plugins in the reverse order, told the result; all is tried  ->  the row goes with its interface's

An interface with such a row may have something of a plugin; DEL is asked for it however often, also without a
namespace. So a daemon that dies anywhere leaves nothing that the next one does not take back.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from corral.network import store
from corral.network.cni import conf_dir, documents, plugins, rows
from corral.network.cni.documents import Configuration, Json
from corral.network.cni.driver import configuration_of
from corral.network.cni.plugins import Attached
from corral.network.cni.sharing import SharedNames
from corral.network.model import Attachment, Endpoint, Interface, Network
from corral.network.pool import is_pinned
from corral.rpc.errors import CorralError
from corral.store import Database, failpoint

log = structlog.get_logger()

AT_ONCE = 64
"""How many ADDs and DELs there are at once; GC takes the turns of all, as it knows nothing of what they make."""


class CniAttachments:
    """See the module. Callers hold the endpoint's lock."""

    def __init__(
        self,
        db: Database,
        directories: Sequence[str],
        conf_dirs: Sequence[str],
        netns_path: Callable[[str], Path],
        names: SharedNames,
    ) -> None:
        self._names = names
        self._conf_dirs = conf_dirs
        self._db = db
        self._directories = directories
        self._netns_path = netns_path
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def add(self, endpoint: Endpoint) -> Endpoint:
        """Have the interfaces made that are not there; returns the endpoint with what plugins gave it.

        Raises FailedPrecondition with a plugin's words, Unavailable; then delete() is due.
        """
        for interface in endpoint.interfaces:
            if interface.network.is_cni and interface.cni_result == rows.UNKNOWN:
                name = configuration_of(interface.network).name
                async with self._turns, self._names.in_use(name, interface.network.id):
                    await self._add(endpoint, interface)
        return self._now(endpoint)

    def _now(self, endpoint: Endpoint) -> Endpoint:
        """With what its rows say that plugins made."""
        found = self._db.read_sync(lambda snapshot: store.endpoint(snapshot, endpoint.key))
        made = {one.network.id: one for one in found.interfaces} if found is not None else {}
        return replace(endpoint, interfaces=tuple(made.get(one.network.id, one) for one in endpoint.interfaces))

    async def _add(self, endpoint: Endpoint, interface: Interface) -> None:
        configuration = configuration_of(interface.network)
        about = self._about(endpoint, interface)
        await self._status(configuration)
        if self._begun(endpoint, interface):  # an earlier ADD that nobody knows the end of
            await self._delete(endpoint, interface)
        await self._db.write(lambda tx: rows.write(tx, endpoint.key, interface, rows.UNKNOWN), durable=True)
        failpoint("network.cni.after_row")
        runtime = _runtime(endpoint, interface)
        result: Json = None
        for plugin in configuration.plugins:
            text = documents.said(configuration, plugin, previous=result, runtime=runtime)
            output = await plugins.run(plugin, "ADD", about, text, self._directories)
            result = documents.result_of(plugin, output, result)
        failpoint("network.cni.after_add")
        made = json.dumps(result or {})
        await self._db.write(lambda tx: rows.write(tx, endpoint.key, interface, made), durable=True)

    def _begun(self, endpoint: Endpoint, interface: Interface) -> bool:
        return self._db.read_sync(lambda snapshot: rows.begun(snapshot, endpoint.key, interface))

    async def delete(self, endpoint: Endpoint, interfaces: Iterable[Interface]) -> None:
        """Have them removed; no error for what is gone. Raises FailedPrecondition with a plugin's words."""
        wanted = {one.network.id for one in interfaces if one.network.is_cni}
        for interface in self._now(endpoint).interfaces if wanted else ():
            if interface.network.id in wanted and self._begun(endpoint, interface):
                async with self._turns:
                    await self._delete(endpoint, interface)
                failpoint("network.cni.after_delete")

    async def _delete(self, endpoint: Endpoint, interface: Interface) -> None:
        configuration = configuration_of(interface.network)
        previous = json.loads(interface.cni_result) if interface.cni_result else None
        runtime = _runtime(endpoint, interface)
        failed: CorralError | None = None
        for plugin in reversed(configuration.plugins):
            text = documents.said(configuration, plugin, previous=previous, runtime=runtime)
            try:
                await plugins.run(plugin, "DEL", self._about(endpoint, interface), text, self._directories)
            except CorralError as e:
                failed = failed or e
        if failed is not None:
            raise failed
        await self._db.write(lambda tx: rows.delete(tx, endpoint.key, interface), durable=True)

    async def _status(self, configuration: Configuration) -> None:
        if configuration.has_status_and_gc:
            for plugin in configuration.plugins:
                said = documents.said(configuration, plugin)
                await plugins.run(plugin, "STATUS", Attached(), said, self._directories)

    async def check(self, endpoint: Endpoint, interface: Interface) -> None:
        """Ask plugins whether all is as they made it. Raises FailedPrecondition with their words."""
        configuration = configuration_of(interface.network)
        if configuration.disable_check or not interface.cni_result:
            return
        previous = json.loads(interface.cni_result)
        for plugin in configuration.plugins:
            text = documents.said(configuration, plugin, previous=previous, runtime=_runtime(endpoint, interface))
            await plugins.run(plugin, "CHECK", self._about(endpoint, interface), text, self._directories)

    async def collect(self, networks: Iterable[Network]) -> None:
        """Have plugins forget what belongs to no container of ours (GC). What fails is logged."""
        for network in networks:
            configuration = configuration_of(network)
            if configuration.has_status_and_gc and not configuration.disable_gc:
                async with contextlib.AsyncExitStack() as all_turns:
                    for _ in range(AT_ONCE):
                        await all_turns.enter_async_context(self._turns)
                    try:
                        await self._collect_alone(network, configuration)
                    except OSError as e:
                        log.warning("network.cni_not_collected", network=network.name, error=str(e))

    async def _collect_alone(self, network: Network, configuration: Configuration) -> None:
        name = configuration.name
        if conf_dir.find(name, self._conf_dirs):  # podman's, say: it does not tell us what it has of it
            log.info("network.cni_of_the_host", name=name)
            return
        with self._names.alone(name) as alone:
            others = self._names.others(name)
            if alone and not others:
                await self._collect(network, configuration)
            else:
                log.info("network.cni_shared", name=name, engines=others, said_in=str(self._names.directory / name))

    async def _collect(self, network: Network, configuration: Configuration) -> None:
        # Plugins know a network by its name, which those of several namespaces may have.
        valid: Json = [
            {"containerID": _container(endpoint), "ifname": interface.name}
            for endpoint in self._db.read_sync(store.endpoints)
            for interface in endpoint.interfaces
            if interface.network.is_cni and configuration_of(interface.network).name == configuration.name
        ]
        more: Mapping[str, Json] = {"cni.dev/valid-attachments": valid, "cni.dev/attachments": valid}
        for plugin in configuration.plugins:
            try:
                text = documents.said(configuration, plugin, more=more)
                await plugins.run(plugin, "GC", Attached(), text, self._directories)
            except CorralError as e:
                log.warning("network.cni_not_collected", network=network.name, error=str(e))

    def _about(self, endpoint: Endpoint, interface: Interface) -> Attached:
        path = self._netns_path(endpoint.netns)
        return Attached(_container(endpoint), str(path) if is_pinned(path) else "", interface.name)


def _container(endpoint: Endpoint) -> str:
    return f"{endpoint.key.namespace}-{endpoint.key.id}"


def _runtime(endpoint: Endpoint, interface: Interface) -> Mapping[str, Json]:
    asked = attachment_for(endpoint, interface)
    ips = [text for text in (asked.ipv4, asked.ipv6) if text]
    name = configuration_of(interface.network).name
    return {
        documents.PORT_MAPPINGS: documents.port_mappings(endpoint.ports),
        documents.IPS: ips,
        documents.MAC: asked.mac,
        documents.ALIASES: {name: list(interface.aliases)} if interface.aliases else None,
    }


def attachment_for(endpoint: Endpoint, interface: Interface) -> Attachment:
    """How an interface was asked for: requests have them in the order of the interfaces."""
    number = [each.network.id for each in endpoint.interfaces].index(interface.network.id)
    asked = endpoint.request.attachments
    return asked[number] if number < len(asked) else Attachment(interface.network.name)
