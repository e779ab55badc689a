"""The zygote: one process, with everything a shim needs imported, that forks shims on request.

It serves a socketpair whose end is its descriptor 3, and ends when ours is closed. Shims are no children of it: when it
is killed no container notices, and the supervisor starts another one.
"""

import asyncio
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import structlog

from corral.kernel.paths import opened
from corral.kernel.process import pidfd_open
from corral.rpc.errors import Internal
from corral.tasks.bundle import Bundle
from corral.tasks.connection import Connection
from corral.tasks.identity import Identity, ended, reap
from corral.tasks.model import optional_int

log = structlog.get_logger()

SOCKET_FD = 3
OUTPUT_MAX_BYTES = 1 << 20
END_S, STAY_S = 5.0, 0.2
"""How long to wait for its end, and what it takes to see whether it ends where that is not certain."""
LIVED_LONG_S = 1.0
RESTART_MIN_S, RESTART_MAX_S = 0.05, 5.0
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from corral.shim.seal import be_sealed; be_sealed(); "
    "from corral.shim.zygote import main; main()"
)


class Zygote:
    """Keeps one zygote running, from start() to stop()."""

    def __init__(self, output: Path) -> None:
        """`output`: a file that gets what the zygote and its shims print, which is what went wrong."""
        self._output = output
        self._connection: Connection | None = None
        self._running = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._pidfd = -1
        self.pid = 0

    def start(self) -> None:
        """Start it; spawn() may be called at once."""
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

    async def spawn(self, bundle: Bundle, listener: socket.socket) -> Identity:
        """Fork a shim for the bundle, serving `listener`, which stays the caller's.

        Raises ConnectionLostError if the zygote died meanwhile: then only the socket tells whether there is a shim.
        Raises CorralError if it refuses.
        """
        await self._running.wait()
        assert self._connection is not None
        fields: dict[str, object] = {
            "bundle": str(bundle.path),
            "namespace": bundle.key.namespace,
            "container": bundle.key.id,
        }
        reply = await self._connection.request("spawn", fields, [os.dup(listener.fileno())])
        pid, start_time = optional_int(reply, "pid"), optional_int(reply, "start_time")
        if not pid or not start_time:
            raise Internal(f"the zygote answered {reply!r:.100}")
        return Identity(pid, start_time)

    def replace(self) -> None:
        """It does not answer: have another one in its place. No container notices."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            log.error("zygote.stuck", pid=self.pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

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
            self._connection = Connection(ours, on_close=self._running.clear)
            self._pidfd = pidfd
            self._running.set()
            try:
                await ended(pidfd)
            finally:
                self._pidfd = -1
                self._running.clear()
                self._connection.close()
            reap(pidfd)


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
