"""TCP ports over an execve: who connects while nobody of gRPC's listens waits in the queue of a plain socket.

    before   a plain socket listens beside gRPC's (SO_REUSEPORT), and has whoever comes from now on; gRPC's is closed
             when those have been heard that had begun to connect to it
    execve   the plain socket's descriptor is inherited
    after    gRPC's new socket listens beside it, and has whoever comes; who has waited is passed on to that. The plain
             one is closed when nobody has come there any more for a while

Sockets that listen beside one another are numbered as they came, and the last of them is chosen by a program
(socket(7), SO_ATTACH_REUSEPORT_CBPF). A connection that has begun stays with the socket that it began with: if that
were closed or filtered, it would be reset.

Whoever is passed on stays so until he hangs up, or the next upgrade sends him away. Who does not ask for SO_REUSEPORT,
as another corrald, can't listen beside us at any time.
"""

import asyncio
import os
import socket
import struct
from array import array
from collections.abc import Collection
from functools import partial

import structlog

from corral.rpc.farewell import Place, Port, attach, share
from corral.rpc.handover import QUEUE, Kept, Latecomers, connected, inherited, keep

log = structlog.get_logger()

PURPOSE = "rpc.port"
# Of two that listen there: the one that came second; of one it is that, whatever the program says. It stays with them.
# Source: linux/filter.h, BPF_RET | BPF_K; socket(7).
CHOOSE_SECOND = array("B", struct.pack("HBBI", 0x06, 0, 0, 1))
SO_ATTACH_REUSEPORT_CBPF = 51
# How long somebody who has begun to connect may take for the rest, which is as long as a packet takes to him and back.
HANDSHAKE_S = 1.0


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

    def serve(self, names: Collection[Port]) -> None:
        """Now that gRPC listens at these."""
        for kept in self._kept:
            waiting = socket.socket(fileno=kept.fds["socket"])
            host, port, *_ = waiting.getsockname()
            if (host, port) not in names:  # the settings know it no more
                waiting.close()
                continue
            self._plain.add(os.fstat(waiting.fileno()).st_ino)
            self._callers.append(Latecomers((waiting,), partial(_connect, host, port)))
        self._kept = ()

    async def wait(self, names: Collection[Port]) -> None:
        """Have who connects from now on wait for whoever follows; returns when those are gRPC's who had begun."""
        for each in self._callers:
            await each.stop_accepting()
        for name in names:
            try:
                self._wait(name)
            except OSError as e:  # who comes is refused, then
                log.warning("upgrade.port_not_kept", address=name[0], port=name[1], error=str(e))
        if names:
            await asyncio.sleep(HANDSHAKE_S)

    def _wait(self, name: Port) -> None:
        ours = share(name, self._plain)
        waiting = _listening(ours[0])
        self._plain.add(os.fstat(waiting.fileno()).st_ino)
        keep(Kept(PURPOSE, {}, {"socket": waiting.detach()}))

    async def close(self) -> None:
        """End their connections."""
        for each in self._callers:
            await each.close()


def _listening(place: Place) -> socket.socket:
    """As the second one there. Raises OSError."""
    waiting = socket.socket(place.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if place.family == socket.AF_INET6:
            waiting.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, place.v6_only)
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        waiting.bind(place.name)
        waiting.listen(QUEUE)
        attach(waiting, SO_ATTACH_REUSEPORT_CBPF, CHOOSE_SECOND)
    except BaseException:
        waiting.close()
        raise
    return waiting


async def _connect(host: str, port: int) -> socket.socket:
    """To a port of ours: at its address, or, of one that has all, at our own. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return await connected(family, ({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port))
