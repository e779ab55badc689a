"""Sockets that outlive the program behind them: a process that executes itself anew drops no connection.

    before   a plain socket is put in the place of gRPC's (rename(2)), so who connects from now on waits in its queue
             gRPC's connections are cut when their calls have ended (corral.rpc.farewell)
    execve   the plain socket's descriptor, and those of the locks, are inherited
    after    gRPC's new socket is put in its place; the bytes of those who wait are passed on to it

At a TCP port, where nothing can be put in another's place, a plain socket listens beside gRPC's (corral.rpc.ports).

gRPC takes no socket that is there already. So the connections of those who waited lead through here; a server of their
own asks them to come again after a moment, at the real socket, which clients do between two calls.
"""

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import structlog

from corral.rpc.address import Target, UnixAddress

log = structlog.get_logger()

VARIABLE = "CORRAL_HANDOVER"
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
QUEUE = 4096
# How long somebody who looked up the old socket may take to connect to it.
LOOKED_UP_S = 2.0
CHUNK = 64 << 10
# For a client to take what a server has left for it.
ANSWERS_S = 1.0


@dataclass(frozen=True, slots=True)
class Handover:
    """What a process leaves to the one that it becomes: open descriptors, by path."""

    locks: Mapping[str, int] = field(default_factory=dict)
    waiting: Mapping[str, int] = field(default_factory=dict)
    kept: Sequence[tuple[str, Mapping[str, str | int], Mapping[str, int]]] = ()
    generation: int = 0
    began_s: float | None = None
    """When the new program was executed, by CLOCK_BOOTTIME."""

    def fds(self) -> Sequence[int]:
        """All of them."""
        kept = [fd for _, _, fds in self.kept for fd in fds.values()]
        return [*self.locks.values(), *self.waiting.values(), *kept]

    def to_text(self) -> str:
        """For to_memory()."""
        return json.dumps(asdict(self))

    def to_memory(self) -> int:
        """A descriptor whose number is for the variable, and whose content is for take(): what is kept for some hundred
        clients is more than one variable may hold (execve(2): MAX_ARG_STRLEN). Raises OSError."""
        memory = os.memfd_create("corral-handover", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(memory, "wb", closefd=False) as file:
            file.write(self.to_text().encode())
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
        return memory


def from_text(text: str) -> Handover:
    """Of whatever version has written it: what this one does not know is ignored, what is not said is nothing."""
    known = {each.name for each in fields(Handover)}
    return Handover(**{name: value for name, value in json.loads(text).items() if name in known})


def take() -> Handover:
    """What was left to this process, nothing for one that was started by others; asking again finds nothing.

    The descriptors are the caller's, and not inherited any further.
    """
    said = os.environ.pop(VARIABLE, "")
    if not said:
        return Handover()
    handover = from_text(said if said.startswith("{") else _read(int(said)))  # the text itself, by earlier versions
    for fd in handover.fds():
        os.set_inheritable(fd, False)
    _inherited.extend(Kept(*each) for each in handover.kept)
    return handover


def _read(memory: int) -> str:
    with open(memory, encoding="utf-8") as file:
        file.seek(0)
        return file.read()


@dataclass(frozen=True, slots=True)
class Kept:
    """What a service leaves to itself: descriptors, and what it has to know of them."""

    purpose: str
    facts: Mapping[str, str | int]
    fds: Mapping[str, int]

    def close(self) -> None:
        """For who has no use for it."""
        for fd in self.fds.values():
            os.close(fd)


_kept: list[Kept] = []
_inherited: list[Kept] = []


def keep(kept: Kept) -> None:
    """Called by a service that is stopped. Where nothing follows, the end of the process closes the descriptors."""
    _kept.append(kept)


def inherited(purpose: str) -> Sequence[Kept]:
    """Called by the same service in the program that follows; the descriptors are its own then."""
    found = [each for each in _inherited if each.purpose == purpose]
    _inherited[:] = [each for each in _inherited if each.purpose != purpose]
    return found


def readmit(purpose: str, read: Callable[[Kept], None]) -> None:
    """inherited(), each given to `read`. Of one that raises LookupError, TypeError or ValueError, as another version
    has written it, the descriptors are closed."""
    for kept in inherited(purpose):
        try:
            read(kept)
        except (LookupError, TypeError, ValueError) as e:
            log.warning("upgrade.kept_not_read", purpose=purpose, reason=repr(e))
            kept.close()


def close_unclaimed() -> None:
    """Called when all services have started: what is left now is of a service or a version that is gone."""
    for kept in _inherited:
        kept.close()
    _inherited.clear()


def all_kept() -> Sequence[tuple[str, Mapping[str, str | int], Mapping[str, int]]]:
    """For a Handover."""
    return [(each.purpose, each.facts, each.fds) for each in _kept]


def take_back() -> None:
    """What was kept for a program that could not be executed is for the services of this one again."""
    _inherited.extend(_kept)
    _kept.clear()


def hidden(path: Path) -> Path:
    """Where a socket is made that is then put at `path`."""
    return path.with_name(f".{path.name}.new")


def make_waiting(path: Path) -> socket.socket:
    """A socket to be put in the place of the one at `path`, with its owner and mode; whoever connects waits.

    Raises OSError.
    """
    new = UnixAddress(hidden(path))
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    target = Target(new)
    try:
        before = path.stat()
        new.path.unlink(missing_ok=True)
        old = os.umask(0o777)
        try:
            waiting.bind(target.name.removeprefix("unix:"))
        finally:
            os.umask(old)
        os.chown(new.path, before.st_uid, before.st_gid)
        new.path.chmod(before.st_mode & 0o777)
        waiting.listen(QUEUE)
    except BaseException:
        waiting.close()
        raise
    finally:
        target.close()
    return waiting


async def connected(family: int, name: Any) -> socket.socket:
    """Raises OSError."""
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await asyncio.get_running_loop().sock_connect(connection, name)
    except BaseException:
        connection.close()
        raise
    return connection


class Latecomers:
    """Connections that waited, passed on to where a server listens. Use from one event loop."""

    def __init__(self, waiting: Sequence[socket.socket], connect: Callable[[], Awaitable[socket.socket]]) -> None:
        """`waiting`: taken over. `connect`: to the server, without blocking."""
        self._connect = connect
        self._waiting = waiting
        self._relays: set[asyncio.Task[None]] = set()
        self.inodes: set[int] = set()
        """Of those connections."""
        self._accepting = [asyncio.create_task(self._accept(each), name="latecomers") for each in waiting]

    async def gone(self) -> None:
        """Returns when the last of them has ended its connection."""
        await asyncio.gather(*self._accepting, return_exceptions=True)
        while self._relays:
            await asyncio.wait(self._relays)

    async def stop_accepting(self) -> None:
        """Nobody comes any more but who waits already: the sockets are closed when this returns."""
        for waiting in self._waiting:
            with suppress(OSError):  # it has had its time
                self._take_all(waiting)
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for waiting in self._waiting:  # of a task that had not begun
            waiting.close()

    async def close(self) -> None:
        """End their connections."""
        tasks = (*self._accepting, *self._relays)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for waiting in self._waiting:
            waiting.close()

    async def _accept(self, waiting: socket.socket) -> None:
        count = 0
        with waiting, suppress(TimeoutError):
            while True:
                async with asyncio.timeout(LOOKED_UP_S):
                    await _somebody(waiting)
                count += self._take_all(waiting)
        log.info("upgrade.latecomers_taken", count=count)

    def _take_all(self, waiting: socket.socket) -> int:
        count = 0
        with suppress(BlockingIOError):
            while True:
                self._take(waiting.accept()[0])
                count += 1
        return count

    def _take(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        inode = os.fstat(connection.fileno()).st_ino
        relay = asyncio.create_task(self._relay(connection), name="latecomer")
        self.inodes.add(inode)
        self._relays.add(relay)
        relay.add_done_callback(self._relays.discard)
        relay.add_done_callback(lambda _: self.inodes.discard(inode))

    async def _relay(self, client: socket.socket) -> None:
        with client, suppress(OSError), await self._connect() as server:
            for each in (client, server):
                if each.family != socket.AF_UNIX:
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await _join(client, server)


async def _somebody(waiting: socket.socket) -> None:
    """To be accepted. What loop.sock_accept() has accepted is lost if it is cancelled then."""
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(waiting, there.set)
    try:
        await there.wait()
    finally:
        loop.remove_reader(waiting)


async def _join(client: socket.socket, server: socket.socket) -> None:
    """HTTP/2 has no half-closed connections: the end of one way is the end of both. But a server that has hung up, and
    takes no more, may have answered before."""
    there, back = (asyncio.create_task(each) for each in (_pass_on(client, server), _pass_on(server, client)))
    try:
        await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        if there.done() and not there.result():
            await asyncio.wait((back,), timeout=ANSWERS_S)
    finally:
        there.cancel()
        back.cancel()
        await asyncio.wait((there, back))


async def _pass_on(source: socket.socket, sink: socket.socket) -> bool:
    """Returns whether it was the source that has ended, and not the sink.

    By sockets: a transport of asyncio forgets what it could still read when it can't write any more.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await loop.sock_recv(source, CHUNK)
        except OSError:
            return True
        if not data:
            return True
        try:
            await loop.sock_sendall(sink, data)
        except OSError:
            return False
