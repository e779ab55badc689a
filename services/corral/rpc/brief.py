"""Calls with one request without gRPC's library, at a socket beside each unix socket of ours.

The library brings a call to the loop, and what it answers back, by way of three threads; here both ways are in the
loop. The wire is the same, gRPC over HTTP/2 (corral.rpc.brief_connection), and so are gates, metadata and errors.

Our client looks for this socket first (corral.client.local_channel). What it has other calls for is at gRPC's own, and
so is everything while this one is not there: from the beginning of an upgrade until the next program serves.

    withdraw  nobody finds it any more; who is connected is served as ever
    leave     GOAWAY, if somebody else is to serve and no call is left inside, as in corral.rpc.farewell; then the end
"""

import asyncio
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from corral.rpc.address import UnixAddress, beside
from corral.rpc.brief_call import Find
from corral.rpc.brief_connection import Connection
from corral.rpc.handover import hidden

log = structlog.get_logger()

_OPTIONS: dict[str, Any] = {"backlog": socket.SOMAXCONN}
if sys.version_info >= (3, 13):  # withdraw() does: a loop would look for it where it was bound, which is elsewhere
    _OPTIONS["cleanup_socket"] = False


class BriefServer:
    """Of one host. For one event loop."""

    def __init__(self, find: Find) -> None:
        """find: the handler of a method, with all that belongs around it."""
        self._find = find
        self._connections: set[Connection] = set()
        self._bound: list[socket.socket] = []
        self._inodes: dict[Path, int] = {}
        self._servers: list[asyncio.Server] = []

    def bind(self, address: UnixAddress, prepare: Callable[[UnixAddress, socket.socket], None]) -> None:
        """Beside that socket. prepare: binds, with the mode and the group that it is to have.

        Where there can be none, everything goes by gRPC's library.
        """
        path = Path(beside(str(address.path)))
        new = UnixAddress(hidden(path))
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            new.path.unlink(missing_ok=True)
            prepare(new, listening)
            listening.listen(socket.SOMAXCONN)
            new.path.rename(path)
            self._inodes[path] = path.stat().st_ino
        except OSError as e:
            listening.close()
            with suppress(OSError):
                new.path.unlink(missing_ok=True)
            log.warning("brief.not_bound", path=str(path), error=str(e))
        else:
            self._bound.append(listening)

    async def start(self) -> None:
        """Serve who comes."""
        loop = asyncio.get_running_loop()
        made = partial(Connection, self._find, self._connections)
        while self._bound:
            server = await loop.create_unix_server(made, sock=self._bound.pop(), **_OPTIONS)
            self._servers.append(server)

    def withdraw(self) -> None:
        """See the module; harmless when repeated."""
        for path, inode in self._inodes.items():
            with suppress(FileNotFoundError):
                if path.stat().st_ino == inode:
                    path.unlink()
        self._inodes.clear()
        for listening in self._bound:
            listening.close()
        for server in self._servers:
            server.close()
        self._bound.clear()
        self._servers.clear()

    async def leave(self, seconds: float, *, may_come_again: bool) -> None:
        """When all gates are shut; see the module."""
        self.withdraw()
        tasks = {task for connection in self._connections for task in connection.tasks()}
        for connection in tuple(self._connections):
            connection.leave(may_come_again=may_come_again)
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
