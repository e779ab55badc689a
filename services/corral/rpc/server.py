"""Hosting: one gRPC server for any number of services.

    bind and listen  ->  start() each, in order; its gate opens and its health becomes SERVING  ->  ready
    stop             ->  each in reverse: shut its gate, let its calls end (grace), cancel the rest, stop()
                         ->  connections ended (corral.rpc.farewell)  ->  close
    hand_over        ->  calls that are inside end (grace), while others are served as ever
                         ->  a waiting socket in the place of ours, or beside it (corral.rpc.ports)  ->  as stop

Composers come after the leaves they call, so while a composer drains its leaves still answer.
"""

import asyncio
import grp
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from corral.rpc import local
from corral.rpc.address import MAX_MESSAGE_BYTES, Address, Target, TcpAddress, Tls, UnixAddress
from corral.rpc.brief import BriefServer
from corral.rpc.eager import begin_calls_at_once
from corral.rpc.errors import FailedPrecondition
from corral.rpc.farewell import Name, Port, cut, listening, send_away
from corral.rpc.handover import Latecomers, connected, hidden, make_waiting
from corral.rpc.interceptor import CallInterceptor, Gate
from corral.rpc.ports import Ports
from corral.rpc.service import Service

log = structlog.get_logger()

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
HEALTH_SERVICE = "grpc.health.v1.Health"

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
SOCKET_MODE = 0o660
# Only root connects to the socket of latecomers: this process.
LATE_MODE = 0o600
# Calls that are left when the time is over get this much to notice.
LAST_CALLS_S = 0.1
# In a hand-over, those that have come while others were waited for; most calls take milliseconds.
NEW_CALLS_S = 1.0
# When connections of latecomers are asked to come again.
STAY_MS = 1000

# Adds servicers of the host itself (version, reflection) given the full names of all hosted; returns their full names.
type Extra = Callable[[grpc.aio.Server, Sequence[str]], Sequence[str]]


@dataclass(slots=True)
class Upgrade:
    """How to end, if not for good."""

    grace_s: float
    on_begin: Callable[[], None]
    on_failure: Callable[[OSError], None]
    """It goes on instead."""
    wanted: bool = False


@dataclass(slots=True)
class _Hosted:
    service: Service
    gate: Gate
    full_names: Sequence[str]


class Host:
    """Serves `services` from start() to stop()."""

    def __init__(self, services: Sequence[Service], *, extra: Extra | None = None) -> None:
        """`services` in the order in which they start: leaves first. Needs a running event loop."""
        gates: dict[str, Gate] = {}
        self._interceptor = CallInterceptor(gates)
        self._ports = Ports()
        # Else two daemons would share a port silently.
        options = (*OPTIONS, ("grpc.so_reuseport", int(self._ports.are_shared)))
        self._everything = local.Everything(self.find)
        self._brief = BriefServer(self.find)
        self._server = local.Recorder(grpc.aio.server(handlers=[self._everything], options=options))
        self._hosted = []
        for service in services:
            gate = Gate()
            full_names = service.register(self._server)
            gates.update(dict.fromkeys(full_names, gate))
            self._hosted.append(_Hosted(service, gate, full_names))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # re-exported without saying so
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)  # type: ignore[no-untyped-call]
        self.full_names = [*gates, HEALTH_SERVICE]
        if extra is not None:
            self.full_names += extra(self._server, self.full_names)
        self._started: list[_Hosted] = []
        self._targets: list[Target] = []
        self._sockets: dict[Path, int] = {}  # with the inode of each
        self._names: list[Name] = []
        self._bound: set[Port] = set()
        """Of those, the ports."""
        self._secure: set[Name] = set()
        """Of those, where TLS is spoken."""
        self._late: asyncio.Task[None] | None = None
        self._late_ends = False
        self._latecomers: Latecomers | None = None

    async def start(
        self,
        addresses: Sequence[Address],
        *,
        tls: Tls | None = None,
        socket_group: str = "",
        waiting: Sequence[socket.socket] = (),
    ) -> Sequence[Address]:
        """Listen, then start every service; returns the addresses, with real ports.

        waiting: what hand_over() of an earlier host returned; is taken over.
        Raises what a service's start() raised, after stopping those that had started; FailedPrecondition if an address
        cannot be listened on.
        """
        begin_calls_at_once(asyncio.get_running_loop())
        for hosted in self._hosted:
            await self._set_health(hosted, NOT_SERVING)
        await self._health.set("", NOT_SERVING)
        bound = [self._bind(address, tls, socket_group) for address in addresses]
        await self._server.start()
        await self._brief.start()
        self._ports.serve(self._bound)
        self._take_late(waiting)
        local.announce(map(str, bound), self)
        try:
            for hosted in self._hosted:
                self._started.append(hosted)
                await hosted.service.start()
                hosted.gate.open()
                await self._set_health(hosted, SERVING)
        except BaseException:
            await self.stop(grace_s=0)
            raise
        await self._health.set("", SERVING)
        return bound

    async def stop(self, *, grace_s: float) -> None:
        """Calls that run get `grace_s` to end; those that come now, or stay longer, end with UNAVAILABLE."""
        await self._health.enter_graceful_shutdown()
        await self._stop_services(grace_s, upgrading=False)
        self._brief.withdraw()
        for path, inode in self._sockets.items():
            with suppress(FileNotFoundError):
                if path.stat().st_ino == inode:
                    path.unlink()
        await self._leave(followed=False)

    def make_places(self) -> Mapping[Path, socket.socket]:
        """Where connections to our unix sockets are to wait. Raises OSError; nothing has changed then."""
        places: dict[Path, socket.socket] = {}
        try:
            for path in self._sockets:
                places[path] = make_waiting(path)
        except OSError:
            for path, place in places.items():
                place.close()
                hidden(path).unlink(missing_ok=True)
            raise
        return places

    async def hand_over(self, waiting: Mapping[Path, socket.socket], *, grace_s: float) -> None:
        """stop(), for somebody who will listen at the same addresses: connections to unix sockets wait for it in
        make_places(), which is `waiting`, those to ports likewise. While the calls that are inside now end, within
        `grace_s`, nobody is refused."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        overdue = await self._end_of_calls(grace_s)
        await self._ports.wait(self._bound)
        for path in waiting:
            hidden(path).rename(path)
        self._brief.withdraw()
        await self._stop_services(max(deadline - loop.time(), NEW_CALLS_S), upgrading=True, overdue=overdue)
        await self._leave(followed=True)

    async def _end_of_calls(self, seconds: float) -> Collection[asyncio.Task[Any]]:
        """Wait for those that are inside now; which are left after `seconds`."""
        waits = [hosted.gate.end_of_visits(seconds) for hosted in self._started]
        return frozenset().union(*await asyncio.gather(*waits))

    async def _stop_services(
        self, grace_s: float, *, upgrading: bool, overdue: Collection[asyncio.Task[Any]] = ()
    ) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        for hosted in self._hosted:
            if hosted not in self._started:
                hosted.gate.shut(upgrading=upgrading)
        for hosted in reversed(self._started):
            hosted.gate.shut(upgrading=upgrading)
            await hosted.gate.drain(max(deadline - loop.time(), LAST_CALLS_S), overdue)
            try:
                await hosted.service.stop()
            except Exception:
                # The others must still be stopped; a next start recovers what this one left.
                log.exception("service.stop_failed", service=hosted.service.name)
        self._started.clear()
        self._interceptor.own_gate.shut(upgrading=upgrading)
        await self._interceptor.own_gate.drain(LAST_CALLS_S)

    async def _leave(self, *, followed: bool) -> None:
        """When all gates are shut, and nobody new finds us."""
        local.withdraw(self)
        if self._latecomers is not None:
            await self._latecomers.stop_accepting()
        may_come_again = followed and not self._has_calls()
        await self._brief.leave(LAST_CALLS_S, may_come_again=may_come_again)
        if may_come_again:
            await send_away([name for name in self._names if name not in self._secure], self._relayed)
        await cut(self._names, self._relayed)
        await self._stop_late()
        await self._ports.close()
        await self._server.stop(LAST_CALLS_S)
        for target in self._targets:
            target.close()

    def _has_calls(self) -> bool:
        """Whether one that was begun goes on, whatever it was told: who made it must not make it again."""
        return any(gate.visiting for gate in (self._interceptor.own_gate, *(hosted.gate for hosted in self._hosted)))

    def _relayed(self) -> Collection[int]:
        return self._ports.inodes | (self._latecomers.inodes if self._latecomers is not None else set())

    def _take_late(self, waiting: Sequence[socket.socket]) -> None:
        if waiting and self._sockets:
            beside = next(iter(self._sockets))
            self._late = asyncio.create_task(self._serve_late(waiting, beside), name="latecomers")
            return
        for each in waiting:  # the settings know no unix address any more
            each.close()

    async def _serve_late(self, waiting: Sequence[socket.socket], beside: Path) -> None:
        """Serve who waited, until the last of them has come to the real address."""
        options = (*OPTIONS, ("grpc.max_connection_age_ms", STAY_MS))
        server = grpc.aio.server(handlers=[self._everything], options=options)
        target = Target(UnixAddress(beside.with_name(f".{beside.name}.late")))
        with _mode(LATE_MODE):
            server.add_insecure_port(target.name)
        name = target.name.removeprefix("unix:")
        self._names.append(name)
        latecomers = self._latecomers = Latecomers(waiting, partial(connected, socket.AF_UNIX, name))
        try:
            await server.start()
            await latecomers.gone()
        finally:
            self._latecomers, self._late_ends = None, True
            await latecomers.close()
            await server.stop(LAST_CALLS_S)
            target.close()

    async def _stop_late(self) -> None:
        if self._late is not None:
            if self._latecomers is not None:  # what has been said to them is still on its way
                await asyncio.wait((self._late,), timeout=LAST_CALLS_S)
            if not self._late_ends:  # else gRPC's server would be left half stopped
                self._late.cancel()
            await asyncio.wait((self._late,))

    def find(self, method: str) -> "local.Handler | None":
        """What is called, with the wire or, by callers in this process, without; see corral.rpc.local."""
        return self._interceptor.known(method) or self._interceptor.wrapped(method, self._server.find(method))

    async def _set_health(self, hosted: _Hosted, status: int) -> None:
        for name in (hosted.service.name, *hosted.full_names):
            await self._health.set(name, status)

    def _bind(self, address: Address, tls: Tls | None, socket_group: str) -> Address:
        if isinstance(address, TcpAddress):
            return self._bind_tcp(address, tls)
        # Made elsewhere and put in its place: what is there may be a socket at which clients wait for this one.
        new = UnixAddress(hidden(address.path))
        target = Target(new)
        self._targets.append(target)
        self._names.append(target.name.removeprefix("unix:"))
        try:
            with _mode(SOCKET_MODE):
                self._server.add_insecure_port(target.name)
        except RuntimeError as e:
            raise FailedPrecondition(f"cannot listen on {address}: {e}") from e
        if socket_group:
            _give_to_group(new, socket_group)
        new.path.rename(address.path)
        self._sockets[address.path] = address.path.stat().st_ino
        self._brief.bind(address, partial(_bind_plainly, socket_group))
        return address

    def _bind_tcp(self, address: TcpAddress, tls: Tls | None) -> TcpAddress:
        target, before = Target(address).name, listening()
        if tls is None and not address.is_loopback:
            raise FailedPrecondition(
                f"{address} can be reached from other machines, so it needs TLS:"
                " give --tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1 or a unix socket",
                reason="TLS_REQUIRED",
            )
        try:
            if tls is None:
                port = self._server.add_insecure_port(target)
            else:
                port = self._server.add_secure_port(target, tls.server_credentials())
        except RuntimeError as e:
            raise FailedPrecondition(f"cannot listen on {address}: is the port in use?") from e
        bound = {place.port for inode, place in listening().items() if inode not in before}
        self._bound |= bound
        self._names += bound
        if tls is not None:
            self._secure |= bound
        return TcpAddress(address.host, port)


async def _hand_over(
    host: Host, places: Mapping[Path, socket.socket], upgrade: Upgrade, on_stop: Callable[[], None]
) -> Mapping[Path, socket.socket] | None:
    upgrade.on_begin()
    await host.hand_over(places, grace_s=upgrade.grace_s)
    if upgrade.wanted:
        return places
    on_stop()  # asked to meanwhile
    _withdraw(places)
    return None


def _withdraw(places: Mapping[Path, socket.socket]) -> None:
    for path, place in places.items():
        place.close()
        path.unlink(missing_ok=True)


@contextmanager
def _mode(mode: int) -> Iterator[None]:
    """A socket that is bound in the block never exists with wider permissions than it is to have."""
    old = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(old)


def _bind_plainly(socket_group: str, address: UnixAddress, listening: socket.socket) -> None:
    """As one of gRPC's is. Raises OSError."""
    target = Target(address)
    try:
        with _mode(SOCKET_MODE):
            listening.bind(target.name.removeprefix("unix:"))
    finally:
        target.close()
    if socket_group:
        _give_to_group(address, socket_group)


def _give_to_group(address: UnixAddress, name: str) -> None:
    """Let the members of the group connect; where there is no such group only root can."""
    with suppress(KeyError):
        os.chown(address.path, -1, grp.getgrnam(name).gr_gid)


@asynccontextmanager
async def hosted(
    services: Sequence[Service], address: Address, *, tls: Tls | None = None, grace_s: float = 0.0
) -> AsyncIterator[Address]:
    """Serve within a block, as tests and other programs like it; yields the address with the real port."""
    host = Host(services)
    [bound] = await host.start([address], tls=tls)
    try:
        yield bound
    finally:
        await host.stop(grace_s=grace_s)


async def serve(
    services: Sequence[Service],
    *,
    addresses: Sequence[Address],
    stop: asyncio.Event,
    grace_s: float,
    upgrade: Upgrade | None = None,
    waiting: Sequence[socket.socket] = (),
    tls: Tls | None = None,
    socket_group: str = "",
    extra: Extra | None = None,
    on_ready: Callable[[Sequence[Address]], None] = lambda _: None,
    on_stop: Callable[[], None] = lambda: None,
) -> Mapping[Path, socket.socket] | None:
    """Serve until `stop` is set. See Host for order and errors.

    If an upgrade is wanted by then, and still is when all has been handed over, returns where connections wait for who
    serves next, who takes them as `waiting`; None after an end for good.
    """
    host = Host(services, extra=extra)
    starting = asyncio.ensure_future(host.start(addresses, tls=tls, socket_group=socket_group, waiting=waiting))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()  # asked to stop while recovering; start() undoes itself
            with suppress(asyncio.CancelledError):
                await starting
            return None
        on_ready(starting.result())
        while True:
            await stopping
            if upgrade is None or not upgrade.wanted:
                break
            try:
                places = host.make_places()
            except OSError as e:
                upgrade.on_failure(e)
                stop.clear()
                stopping = asyncio.ensure_future(stop.wait())
                continue
            return await _hand_over(host, places, upgrade, on_stop)
        on_stop()
        await host.stop(grace_s=grace_s)
        return None
    finally:
        stopping.cancel()
