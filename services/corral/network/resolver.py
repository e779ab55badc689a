"""A resolver for each network that has names: on the gateway's address, for those in the network only.

Its sockets are bound to the network's bridge, so nobody else's question comes in, whatever the host routes. They are
the daemon's: while that is away names are not found, addresses and published ports go on.
"""

import asyncio
import contextlib
import importlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, cast

import structlog

from corral.network.links import index_of
from corral.network.model import Endpoint, Network
from corral.network.names import Names
from corral.rpc.blocking import run_blocking

if TYPE_CHECKING:
    from types import ModuleType

log = structlog.get_logger()

PORT = 53
# Questions under way, of one network: what comes on top is dropped, and asked again.
MOST_AT_ONCE = 256
IDLE_S = 10.0
LONGEST_QUESTION = 4096


@dataclass(slots=True)
class _Listener:
    """What listens in one network."""

    bridge_index: int
    udp: asyncio.DatagramTransport
    tcp: asyncio.Server

    def close(self) -> None:
        self.udp.close()
        self.tcp.close()


class Resolvers:
    """All of them. On the loop."""

    def __init__(self, names: Callable[[], Names], upstream: Callable[[Endpoint], Sequence[str]]) -> None:
        """names: those there are now. upstream: whom to ask for the rest, for a container."""
        self._names = names
        self._upstream = upstream
        self._known: Names | None = None
        self._listening: dict[str, _Listener] = {}
        self._beginning = asyncio.Lock()
        self._answers: Any = None  # the module corral.network.answers
        self._busy: set[asyncio.Task[None]] = set()

    def changed(self) -> None:
        """Who is called what is to be looked up anew."""
        self._known = None

    def serves(self, network: Network) -> bool:
        """Whether questions of those in a network are answered."""
        return network.id in self._listening

    def stands(self, network: Network) -> bool:
        """Whether it listens on the bridge that is there now."""
        listener = self._listening.get(network.id)
        try:
            return listener is not None and listener.bridge_index == index_of(network.bridge)
        except OSError:
            return False

    async def listen(self, network: Network) -> None:
        """Answer those in a network, whose bridge stands. Where something else has the port, that is but reported."""
        async with self._beginning:  # two who want the same would be in each other's way
            if self.stands(network):
                return
            self.stop(network.id)
            if self._answers is None:
                self._answers = await run_blocking(_load)
            try:
                self._listening[network.id] = await self._listen(network)
            except OSError as e:
                log.warning("network.no_names", network=network.name, error=str(e))

    async def _listen(self, network: Network) -> _Listener:
        loop, index = asyncio.get_running_loop(), index_of(network.bridge)
        gateway = str(network.ranges[0].gateway)
        with contextlib.ExitStack() as stack:
            sockets = [
                stack.enter_context(_socket(network.bridge, gateway, kind))
                for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)
            ]
            udp, _ = await loop.create_datagram_endpoint(lambda: _Udp(self, network.id), sock=sockets[0])
            stack.callback(udp.close)
            tcp = await asyncio.start_server(lambda r, w: self._on_connection(network.id, r, w), sock=sockets[1])
            stack.pop_all()
        return _Listener(index, udp, tcp)

    def stop(self, network_id: str) -> None:
        """Answer nobody there any more."""
        if (listener := self._listening.pop(network_id, None)) is not None:
            listener.close()

    def close(self) -> None:
        """Answer nobody."""
        for network_id in list(self._listening):
            self.stop(network_id)
        for task in self._busy:
            task.cancel()

    # Answering

    def on_question(self, network_id: str, wire: bytes, source: str, reply: Callable[[bytes], object]) -> None:
        """A question that came as one datagram."""
        if len(self._busy) < MOST_AT_ONCE:
            task = asyncio.get_running_loop().create_task(self._reply(network_id, wire, source, reply))
            self._busy.add(task)
            task.add_done_callback(self._busy.discard)

    async def _reply(self, network_id: str, wire: bytes, source: str, reply: Callable[[bytes], object]) -> None:
        if answer := await self._answer(network_id, wire, source, tcp=False):
            reply(answer)

    async def _on_connection(self, network_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = str(writer.get_extra_info("peername")[0])
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            while True:
                async with asyncio.timeout(IDLE_S):
                    length = int.from_bytes(await reader.readexactly(2))
                    wire = await reader.readexactly(min(length, LONGEST_QUESTION))
                answer = await self._answer(network_id, wire, source, tcp=True)
                if answer is None:
                    break
                writer.write(len(answer).to_bytes(2) + answer)
                await writer.drain()
        writer.close()

    async def _answer(self, network_id: str, wire: bytes, source: str, *, tcp: bool) -> bytes | None:
        answers = self._answers
        try:
            query = answers.parse(wire)
        except answers.Malformed:
            return None
        if self._known is None:
            self._known = self._names()
        asker = self._known.asker(network_id, ip_address(source))
        if (own := answers.own_answer(query, self._known, asker)) is not None:
            found: bytes = answers.to_wire(query, own, tcp=tcp)
            return found
        assert asker is not None, "who is nobody was refused"
        foreign: bytes | None = await answers.ask(wire, self._servers(asker), tcp=tcp)
        return foreign or answers.failure(query)

    def _servers(self, asker: Endpoint) -> Sequence[str]:
        """Nobody, for who is to reach nobody outside."""
        if all(interface.network.internal for interface in asker.interfaces):
            return ()
        return self._upstream(asker)


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, resolvers: Resolvers, network_id: str) -> None:
        self._resolvers, self._network_id = resolvers, network_id

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)  # uvloop's is of no such class

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._resolvers.on_question(self._network_id, data, addr[0], lambda answer: self._send(answer, addr))

    def _send(self, answer: bytes, addr: tuple[str, int]) -> None:
        if not self._transport.is_closing():
            self._transport.sendto(answer, addr)


def _socket(bridge: str, address: str, kind: socket.SocketKind) -> socket.socket:
    """Bound to the gateway's address, and to the bridge: what comes by another interface is not for it."""
    made = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode() + b"\0")
        if kind is socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, PORT))
    except BaseException:
        made.close()
        raise
    return made


def _load() -> "ModuleType":
    return importlib.import_module("corral.network.answers")
