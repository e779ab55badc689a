"""The process: told by the network service what to serve, and goes on with that when the service is gone.

It ends when it has nothing to serve, or when nobody can find it any more: the socket that it is told by has its place
among the run state.
"""

import contextlib
import os
import resource
import socket
import sys
import time
from pathlib import Path

from corral.kernel import capabilities, process, rlimits
from corral.network.proxy import wire
from corral.network.proxy.datagrams import DatagramPort
from corral.network.proxy.loop import READ, Loop
from corral.network.proxy.streams import Room, StreamPort

LISTENER_FD = 3
MOST_CONNECTIONS = 4096  # of all ports together: whoever does not read has it keep two chunks at most
_IDLE_S = 5.0
_LOOK_S = 5.0
_ANSWER_S = 1.0  # a service that does not read what it asked for does not hold up the rest


class Proxy:
    """See the module."""

    def __init__(self, listener: socket.socket, place: Path, most_connections: int) -> None:
        """place: of the listener among files. Raises OSError."""
        listener.setblocking(False)
        listener.listen()  # by us from now on: see SO_PEERCRED in unix(7)
        self._listener = listener
        self._place = place
        self._inode = place.stat().st_ino
        self._service: socket.socket | None = None
        self._loop = Loop()
        self._room = Room(most_connections)
        self._serving: dict[wire.Key, tuple[StreamPort | DatagramPort, wire.Port]] = {}
        self._used = time.monotonic()
        self._loop.watch(listener, READ, self._on_service)
        self._loop.call_later(_LOOK_S, self._look)
        self._is_needed = True

    def run(self) -> None:
        """Until it is not needed any more."""
        while self._is_needed:
            self._loop.run_once()

    def _look(self) -> None:
        if self._serving:
            self._used = time.monotonic()
        if self._service is None:
            self._is_needed = bool(self._serving) and self._is_found()
        else:
            self._is_needed = time.monotonic() < self._used + _IDLE_S
        self._loop.call_later(_LOOK_S, self._look)

    def _is_found(self) -> bool:
        """Whether a service would find it, as far as one without capabilities may look."""
        try:
            return self._place.stat().st_ino == self._inode
        except PermissionError:  # a directory above is another user's alone
            return True
        except OSError:
            return False

    def _on_service(self, _events: int) -> None:
        """A service that comes takes the place of the one before."""
        try:
            came, _ = self._listener.accept()
        except OSError:  # it has gone again, or no file is left
            return
        self._leave()
        self._service = came
        came.settimeout(_ANSWER_S)
        self._used = time.monotonic()
        self._loop.watch(self._service, READ, self._on_message)

    def _leave(self) -> None:
        if self._service is not None:
            self._loop.watch(self._service, 0, self._on_message)
            self._service.close()
        self._service = None

    def _on_message(self, _events: int) -> None:
        assert self._service is not None
        try:
            received = wire.receive(self._service)
            if received is not None:
                message, ports = received
                if ports:
                    self._serve(*ports)
                    wire.send(self._service, {"served": len(ports)})
                self._do(self._service, message)
                return
        except (OSError, ValueError):  # it tells a new proxy, or this one anew
            pass
        self._leave()
        self._is_needed = bool(self._serving)

    def _do(self, service: socket.socket, message: wire.Message) -> None:
        keys = message.get("drop")
        if isinstance(keys, list):
            for key in map(wire.key_of, keys):
                self._drop(key)
            wire.send(service, {"dropped": len(keys)})
        if message.get("list"):
            for ports in wire.in_packets([port for _, port in self._serving.values()]):
                wire.send(service, {"more": True}, ports)
            wire.send(service, {"more": False})

    def _serve(self, *ports: wire.Port) -> None:
        for port in ports:
            known = self._serving.get(port.key)
            if known is not None and not port.sockets:
                server, before = known
                server.lead_to(port.target)
                self._serving[port.key] = server, wire.Port(port.key, port.target, before.sockets)
            elif port.sockets:
                self._drop(port.key)
                self._serving[port.key] = self._server(port), port

    def _server(self, port: wire.Port) -> StreamPort | DatagramPort:
        """Raises OSError."""
        if port.key[0] == "udp":
            return DatagramPort(self._loop, port.sockets[0], port.target)
        return StreamPort(self._loop, port.sockets, port.target, self._room)

    def _drop(self, key: wire.Key) -> None:
        server, port = self._serving.pop(key, (None, None))
        if server is not None and port is not None:
            server.close()
            for each in port.sockets:
                each.close()


def main() -> None:
    """The program: its arguments end with the place of the socket at which the service finds it, its descriptor 3."""
    os.chdir("/")
    rlimits.raise_soft("RLIMIT_NOFILE")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most_connections = min(MOST_CONNECTIONS, files // 4)  # of two sockets each: the other half is for ports
    proxy = Proxy(socket.socket(fileno=LISTENER_FD), Path(sys.argv[-1]), most_connections)
    _lose_privileges()
    proxy.run()


def _lose_privileges() -> None:
    """Whoever may call ::1 can make it take memory, and sends it what it reads."""
    process.lose_oom_protection()
    process.set_no_new_privs()
    with contextlib.suppress(PermissionError):  # the service has no CAP_SETPCAP
        capabilities.limit_bounding(0)
    capabilities.set_ambient(0)
    capabilities.set_process(effective=0, permitted=0, inheritable=0)
