"""TCP ports over an execve: who connects while nobody of gRPC's listens waits in the queue of a plain socket.

    before   a plain socket listens beside gRPC's (SO_REUSEPORT), which then is closed
    execve   its descriptor is inherited
    after    gRPC's new socket listens beside it; who has waited is passed on to that, and the plain one closed

Whoever is passed on stays so until he hangs up, or the next upgrade sends him away. Who does not ask for SO_REUSEPORT,
as another corrald, can't listen beside us at any time.
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from functools import partial

import structlog

from corral.rpc.farewell import Place, share, take_no_more
from corral.rpc.handover import QUEUE, Kept, Latecomers, Streams, inherited, keep

log = structlog.get_logger()

PURPOSE = "rpc.port"


class Ports:
    """Those of one server."""

    def __init__(self) -> None:
        """With those at which somebody may have waited for this process."""
        self._kept = inherited(PURPOSE)
        self._callers: list[Latecomers] = []
        self._plain: set[int] = set()

    @property
    def are_shared(self) -> bool:
        """Whether gRPC's socket has to listen beside one of ours."""
        return bool(self._kept)

    @property
    def inodes(self) -> set[int]:
        """Of sockets there that are not gRPC's."""
        return self._plain.union(*(each.inodes for each in self._callers))

    def serve(self, ports: Sequence[int]) -> None:
        """Now that gRPC listens at these."""
        for kept in self._kept:
            port, waiting = int(kept.facts["port"]), socket.socket(fileno=kept.fds["socket"])
            if port not in ports:  # the settings know it no more
                waiting.close()
                continue
            with waiting:
                callers = Latecomers((waiting,), partial(_connect, waiting.getsockname()))
                callers.stop_accepting()
            self._callers.append(callers)
        self._kept = ()

    def wait(self, port: int) -> None:
        """Have who connects from now on wait for whoever follows."""
        try:
            places = share(port)
            take_no_more([port])  # by gRPC: whom it has not accepted when it stops is cut off
            for place in places:
                waiting = _listening(place)
                self._plain.add(os.fstat(waiting.fileno()).st_ino)
                keep(Kept(PURPOSE, {"port": port}, {"socket": waiting.detach()}))
        except OSError as e:  # who comes is refused, then
            log.warning("upgrade.port_not_kept", port=port, error=str(e))

    async def close(self) -> None:
        """End their connections."""
        for each in self._callers:
            await each.close()


def _listening(place: Place) -> socket.socket:
    waiting = socket.socket(place.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if place.family == socket.AF_INET6:
            waiting.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, place.v6_only)
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        waiting.bind(place.name)
        waiting.listen(QUEUE)
    except BaseException:
        waiting.close()
        raise
    return waiting


async def _connect(name: Sequence[str | int]) -> Streams:
    """To a port of ours: at its address, or, of one that has all, at our own."""
    host, port = str(name[0]), int(name[1])
    return await asyncio.open_connection({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
