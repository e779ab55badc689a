"""The zygote: one process, with everything a shim needs imported, that forks shims on request.

It serves a socketpair whose end is its descriptor 3, and ends when ours is closed. Shims outlive it: when it is killed
containers go on, and the supervisor starts another one. What ends with it is what it kept for when also a shim is
killed: copies of streams, and that it reaps in the shim's place. This service has copies too, and pidfds; only where
that was away as well, a terminal may be lost, or the end of an output or an exit code not be known.
"""

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import structlog

from corral.kernel.paths import opened
from corral.kernel.process import pidfd_open, send_signal
from corral.rpc.errors import Internal
from corral.shim.wire import Message
from corral.tasks.bundle import Bundle
from corral.tasks.connection import Connection, ConnectionLostError
from corral.tasks.identity import Identity, ended, reap
from corral.tasks.model import optional_int

log = structlog.get_logger()

SOCKET_FD = 3
OUTPUT_MAX_BYTES = 1 << 20
END_S, STAY_S = 5.0, 0.2
"""How long to wait for its end, and what it takes to see whether it ends where that is not certain. One that was killed
and has not ended by then is in the kernel."""
LIVED_LONG_S = 1.0
RESTART_MIN_S, RESTART_MAX_S = 0.05, 5.0
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from corral.shim.seal import be_sealed; be_sealed(); "
    "from corral.shim.zygote import main; main()"
)


@dataclass(eq=False, slots=True)
class _One:
    """A zygote. `patience`: with waiting for its end; `over`: nothing more is expected of it."""

    pidfd: int
    connection: Connection
    patience: asyncio.Timeout
    over: asyncio.Event


class Zygote:
    """Keeps one zygote running, from start() to stop()."""

    def __init__(self, output: Path) -> None:
        """`output`: a file that gets what the zygote and its shims print, which is what went wrong."""
        self._output = output
        self._connection: Connection | None = None
        self._ready = asyncio.Event()
        self._current: _One | None = None  # that is ready
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self.pid = 0

    def start(self) -> None:
        """Start it."""
        self._supervisor = asyncio.create_task(self._supervise(), name="zygote")

    async def stop(self, *, has_shims: bool | None) -> None:
        """Leave it: it ends at once, or with the last of its shims, which live on.

        has_shims: None if it may have some. Without any it has ended when this returns, and holds no file of ours any
        more.
        """
        self._stopping.set()
        if self._connection is not None:
            self._connection.close()
        if self._supervisor is not None:
            await asyncio.wait((self._supervisor,), timeout={True: 0, None: STAY_S, False: END_S}[has_shims])
            if not self._supervisor.done():
                self._supervisor.cancel()
                await asyncio.wait((self._supervisor,))

    async def ready(self) -> None:
        """Return once there is one that has imported all, and answers."""
        await self._ready.wait()

    async def spawn(self, bundle: Bundle, listener: socket.socket, *, timeout_s: float) -> Identity:
        """Fork a shim for the bundle, serving `listener`, which stays the caller's.

        One that does not answer in time is replaced. Raises ConnectionLostError if the zygote is not ready, or was
        ended meanwhile: then only the socket tells whether there is a shim. Raises CorralError if it refuses.
        """
        one = self._at_work()
        try:
            return await _ask(one, "spawn", order(bundle), listener, timeout_s)
        except TimeoutError as e:
            self._replace(one)
            await one.over.wait()
            raise ConnectionLostError("the zygote did not answer in time") from e

    async def stand_by(self, connection: socket.socket, *, timeout_s: float) -> Identity:
        """Have a shim wait at the other end of a connection, which stays the caller's, for an order() and the listening
        socket of its bundle. It ends with either, connection or zygote.

        Raises ConnectionLostError if the zygote is not ready, or does not answer in time, CorralError if it refuses.
        """
        try:
            return await _ask(self._at_work(), "stand_by", {}, connection, timeout_s)
        except TimeoutError as e:  # nobody waits for it: who needs a shim finds out whether it is stuck
            raise ConnectionLostError("the zygote did not answer in time") from e

    def _at_work(self) -> _One:
        if self._current is None:
            raise ConnectionLostError("the zygote has ended")
        return self._current

    def _replace(self, one: _One) -> None:
        """It does not answer: have another one in its place, unless somebody has already. See the module for what that
        costs."""
        if self._current is not one:
            return
        log.error("zygote.stuck", pid=self.pid)
        self._lose()
        one.patience.reschedule(asyncio.get_running_loop().time() + END_S)
        with suppress(ProcessLookupError):
            send_signal(one.pidfd, signal.SIGKILL)

    def _lose(self) -> None:
        self._current = None
        self._ready.clear()

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s = 0.0
        while not self._stopping.is_set():
            began = loop.time()
            try:
                await self._run_once()
            except OSError:
                log.exception("zygote.not_started")
            if self._stopping.is_set():
                return
            log.warning("zygote.ended", pid=self.pid)
            lived_long = loop.time() - began > LIVED_LONG_S
            delay_s = 0.0 if lived_long else min(max(delay_s * 2, RESTART_MIN_S), RESTART_MAX_S)
            await asyncio.sleep(delay_s)

    async def _run_once(self) -> None:
        """Start one and return when it has ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self.pid = _spawn_process(theirs.fileno(), self._output)
            except BaseException:
                ours.close()
                raise
        with opened(pidfd_open(self.pid)) as pidfd:
            self._connection = Connection(ours, on_close=self._lose)
            over = asyncio.Event()
            try:
                async with asyncio.timeout(None) as patience:
                    self._await_ready(_One(pidfd, self._connection, patience, over))
                    await ended(pidfd)
                reap(pidfd)
            except TimeoutError:  # its zombie, if it becomes one, stays for as long as this process
                log.error("zygote.unkillable", pid=self.pid)
            finally:
                self._lose()
                self._connection.close()
                over.set()

    def _await_ready(self, one: _One) -> None:
        """How long it takes to start is no sign of anything: nothing is asked of it before."""
        answer = one.connection.request("ready", {})

        def answered(answer: asyncio.Future[Message]) -> None:
            if not answer.cancelled() and answer.exception() is None:
                self._current = one
                self._ready.set()

        answer.add_done_callback(answered)


async def _ask(one: _One, op: str, fields: Message, sock: socket.socket, timeout_s: float) -> Identity:
    """The shim that it answers with. Raises TimeoutError, ConnectionLostError, CorralError."""
    async with asyncio.timeout(timeout_s):
        reply = await one.connection.request(op, fields, [os.dup(sock.fileno())])
    pid, start_time = optional_int(reply, "pid"), optional_int(reply, "start_time")
    if not pid or not start_time:
        raise Internal(f"the zygote answered {reply!r:.100}")
    return Identity(pid, start_time)


def order(bundle: Bundle) -> Message:
    """What tells a shim which bundle is its own."""
    return {"bundle": str(bundle.path), "namespace": bundle.key.namespace, "container": bundle.key.id}


def _spawn_process(socket_fd: int, output: Path) -> int:
    """Start the zygote. It gets its socket, and none of our descriptors, signal settings or environment."""
    spec = find_spec("corral.shim")
    assert spec is not None
    assert spec.origin is not None
    source_root = str(Path(spec.origin).parents[2])
    environment = {name: os.environ[name] for name in ("PATH", "CORRAL_FAILPOINTS") if name in os.environ}
    appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    if output.exists() and output.stat().st_size > OUTPUT_MAX_BYTES:
        appending |= os.O_TRUNC
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", "-c", _PROGRAM, source_root],
        environment,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, socket_fd, SOCKET_FD),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), appending, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,  # a ctrl-c at our terminal is not for containers
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    )
