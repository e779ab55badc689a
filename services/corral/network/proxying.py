"""Published ports at ::1, from where the kernel routes nothing: a process of ours listens there and passes bytes on.

    service (netlink thread)  --- serve, drop: sockets and targets --->  proxy, one for all ports (corral.network.proxy)

The container sees the proxy's connections come from the host, as those from 127.0.0.1. The process is started with the
first port, ends after the last, and is started again when it dies; what waits in the queues of the sockets is served
then, as this process has them too. Only the proxy listens, when it serves: whoever calls a port that nobody serves is
refused, and tries IPv4. The other way round, it goes on while the service is down, and keeps all sockets of
its ports, so that no program of the host gets one meanwhile; the next service finds it by its socket among the run
state.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import structlog

from corral.kernel.process import pidfd_open, send_signal
from corral.network.links import NetlinkThread
from corral.network.ports import out_of_the_way
from corral.network.proxy import wire
from corral.network.proxy.program import LISTENER_FD

log = structlog.get_logger()

_ANSWER_S = 5.0
_END_S = 5.0
_LIVED_LONG_S = 1.0
_RETRY_MIN_S, _RETRY_MAX_S = 0.05, 5.0
_PROGRAM = "import sys; sys.path[:0] = sys.argv[1:3]; from corral.network.proxy.program import main; main()"


class Proxying:
    """See the module. For the netlink thread, but for follow() and leave(), which are for the event loop."""

    def __init__(self, state: Path, thread: NetlinkThread) -> None:
        self._path = state / "proxy.sock"
        self._output = state / "proxy.log"
        self._thread = thread
        self._served: dict[wire.Key, wire.Port] = {}
        self._control: socket.socket | None = None
        self._pidfd = -1
        self._began = 0.0
        self._delay_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched: set[int] = set()
        self._reviving: asyncio.Task[None] | None = None

    @property
    def is_left(self) -> bool:
        """Whether there may be a proxy of an earlier service."""
        return self._path.exists()

    def follow(self) -> None:
        """Start it again when it ends, from now on until leave()."""
        self._loop = asyncio.get_running_loop()

    def leave(self) -> None:
        """It is the next service's."""
        if self._reviving is not None:
            self._reviving.cancel()
        for pidfd in self._watched:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
        self._watched.clear()
        self._loop = None

    def find(self) -> Sequence[wire.Port]:
        """What the proxy of an earlier service goes on with; first of all. One that does not answer is ended."""
        try:
            self._connect()
            assert self._control is not None
            self._is(_served_by(self._control, self._path))
            wire.send(self._control, {"list": True})
            found: list[wire.Port] = []
            more: object = True
            while more:
                message, ports = _received(self._control)
                found += [replace(port, sockets=[out_of_the_way(each) for each in port.sockets]) for port in ports]
                more = message.get("more")
        except (OSError, ValueError) as e:
            if not isinstance(e, FileNotFoundError | ConnectionRefusedError):
                log.warning("network.proxy_not_found", error=str(e))
            self._end()
            return []
        self._served = {port.key: port for port in found}
        return found

    def serve(self, ports: Collection[wire.Port]) -> None:
        """Have these lead to their targets; no error. What of them is so already stays as it is."""
        changed = []
        for port in ports:
            known = self._served.get(port.key)
            if known is None or known.target != port.target:
                changed.append(wire.Port(port.key, port.target, () if known else port.sockets))
                self._served[port.key] = port
        if not changed:
            return
        if self._control is None:
            self._start_or_tell()
            return
        try:
            self._tell(self._control, changed)
        except (OSError, ValueError) as e:
            self._start_anew(e)

    def drop(self, keys: Collection[wire.Key]) -> None:
        """When this returns it has no socket of these any more, and what came by them is cut off; no error."""
        gone = [port for key in keys if (port := self._served.pop(key, None)) is not None]
        if gone and self._control is not None:
            try:
                for some in _in_bounds([port.key for port in gone]):
                    wire.send(self._control, {"drop": some})
                    _received(self._control)
            except (OSError, ValueError) as e:
                self._start_anew(e)
        _refuse_callers(gone)

    def close(self) -> None:
        """It goes on."""
        if self._control is not None:
            self._control.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._control, self._pidfd = None, -1

    # The process

    def _start_or_tell(self) -> None:
        try:
            self._start()
        except (OSError, ValueError) as e:
            log.warning("network.proxy_not_started", error=str(e))
            self._end()
            _refuse_callers(self._served.values())
            self._on_loop(self._try_again)

    def _start(self) -> None:
        """Raises OSError, ValueError."""
        self._path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            with _short(self._path) as path:
                listener.bind(path)
            self._path.chmod(0o600)
            listener.listen()
            self._is(pidfd_open(_spawn(listener.fileno(), self._path, self._output)))
            self._connect()
        assert self._control is not None
        self._tell(self._control, list(self._served.values()))
        log.info("network.proxy_started", ports=len(self._served))

    def _connect(self) -> None:
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_ANSWER_S)
        with _short(self._path) as path:
            self._control.connect(path)

    def _is(self, pidfd: int) -> None:
        self._pidfd, self._began = pidfd, time.monotonic()
        watched = os.dup(pidfd)
        self._on_loop(lambda: self._watch(watched))

    def _tell(self, control: socket.socket, ports: Sequence[wire.Port]) -> None:
        """It serves them when this returns. Raises OSError, ValueError."""
        for some in wire.in_packets(ports):
            wire.send(control, {}, some)
            _received(control)

    def _start_anew(self, error: Exception) -> None:
        """Of one that does not answer nothing is left."""
        log.warning("network.proxy_ended", error=str(error))
        self._end()
        if self._served:
            self._start_or_tell()

    def _end(self) -> None:
        """It has ended when this returns, and closed all its sockets."""
        pidfd = self._pidfd
        if pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                send_signal(pidfd, signal.SIGKILL)
            _has_ended(pidfd, _END_S)
            with contextlib.suppress(ChildProcessError):  # an earlier service's
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        self.close()
        self._path.unlink(missing_ok=True)

    # On the event loop, which sees it end

    def _on_loop(self, call: Callable[[], None]) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(call)

    def _watch(self, pidfd: int) -> None:
        self._watched.add(pidfd)
        asyncio.get_running_loop().add_reader(pidfd, self._on_end, pidfd)

    def _on_end(self, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        self._watched.discard(pidfd)
        os.close(pidfd)
        if time.monotonic() - self._began > _LIVED_LONG_S:
            self._delay_s = 0.0
        self._try_again()

    def _try_again(self) -> None:
        async def revive(delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            await self._thread.run(lambda _: self._revive())

        if self._loop is not None:
            self._reviving = self._loop.create_task(revive(self._delay_s))
            self._delay_s = min(max(2 * self._delay_s, _RETRY_MIN_S), _RETRY_MAX_S)

    def _revive(self) -> None:
        if self._pidfd >= 0 and not _has_ended(self._pidfd, 0):
            return  # another has taken its place
        if self._pidfd >= 0 and self._served:
            log.warning("network.proxy_ended")
        self._end()
        if self._served:
            self._start_or_tell()


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of it that fits in the address of a socket, of 107 bytes. Raises OSError: it has no directory."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _refuse_callers(ports: Iterable[wire.Port]) -> None:
    """Have nobody listen on their sockets, which stay bound; no error."""
    for port in ports:
        if port.sockets and port.sockets[0].type == socket.SOCK_STREAM:
            with contextlib.suppress(OSError):  # ENOTCONN: nobody does
                port.sockets[0].shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                port.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)


def _received(control: socket.socket) -> tuple[wire.Message, Sequence[wire.Port]]:
    """Raises OSError, also at the end; ValueError."""
    received = wire.receive(control)
    if received is None:
        raise ConnectionResetError("it has hung up")
    return received


def _served_by(control: socket.socket, path: Path) -> int:
    """A pidfd of the proxy that has called listen(2) for what this is connected to. Raises OSError."""
    pid, *_ = struct.unpack("iII", control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    pidfd = pidfd_open(pid)
    if os.fsencode(path) not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
        os.close(pidfd)
        raise ProcessLookupError("it has just ended")
    return pidfd


def _in_bounds(keys: Sequence[wire.Key]) -> Sequence[Sequence[wire.Key]]:
    return [keys[at : at + 500] for at in range(0, len(keys), 500)]


def _has_ended(pidfd: int, within_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def _source_root(package: str) -> str:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parents[2])


def _spawn(listener: int, path: Path, output: Path) -> int:
    """Start the process in the network namespace of the calling thread, with none of our descriptors but one."""
    appending = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return os.posix_spawn(
        sys.executable,
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _PROGRAM,
            *map(_source_root, ("corral.network", "corral.kernel")),
            str(path),
        ],
        {},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, listener, LISTENER_FD),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), appending, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    )
