"""Executing itself anew: the same process, with the code and the settings that are on disk now.

    asked (SIGUSR2, Version.Upgrade)  ->  `corrald … --check` in a process of its own
        it fails                      ->  its sentence is reported, and everything goes on
        it succeeds                   ->  the host hands over (corral.rpc.handover)  ->  execve
            that fails                ->  the same, but a host of this program takes over what was handed over

Containers have shims, and are not concerned. The pid stays, so a service manager, and who waits for us, sees no change.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from corral.api.version.v1 import version_pb2, version_pb2_grpc
from corral.daemon.notify import notify, notify_reloading
from corral.kernel.paths import opened
from corral.kernel.process import pidfd_open
from corral.rpc.channel import open_channel
from corral.rpc.errors import UNSERVED, CorralError, FailedPrecondition, Unavailable, Unimplemented
from corral.rpc.handover import VARIABLE, Handover, all_kept, take_back
from corral.rpc.server import Upgrade

log = structlog.get_logger()

SIGNAL = signal.SIGUSR2
CHECK_TIMEOUT_S = 120.0
# Who had asked for an upgrade that failed has asked again by then.
ASK_AGAIN_S = 30.0


def command(argv: Sequence[str]) -> list[str]:
    """What to execute: how this process was started, by `argv` after the program and the interpreter's options."""
    own = sys.orig_argv
    if argv and own[-len(argv) :] != list(argv):  # another program called main()
        return [sys.executable, "-P", "-m", "corral.daemon", *argv]
    return [sys.executable, *own[1:]]


class Upgrading:
    """Asks for an upgrade of this process, at most one at a time."""

    def __init__(
        self, argv: Sequence[str], stop: asyncio.Event, generation: int, *, grace_s: float, failure: str = ""
    ) -> None:
        """`stop` is what ends the host; generation: how often this process has been upgraded. failure: why it was not
        just now, for who asked and asks again."""
        self.generation = generation
        self._failure, self._since = failure, time.monotonic()
        self.plan = Upgrade(grace_s, self._on_begin, self._on_failure)
        self._argv = argv
        self._stop = stop
        self._asked: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._ends = False

    def set_ready(self) -> None:
        """The host serves."""
        self._ready.set()

    async def beyond(self, generation: int) -> None:
        """Returns in a later generation than that, once it serves.

        Raises Unavailable, UNSERVED, in an earlier one, which then ends; FailedPrecondition if it can't.
        """
        await self._ready.wait()
        failure, self._failure = self._failure, ""
        if failure and time.monotonic() < self._since + ASK_AGAIN_S and generation >= self.generation:
            raise FailedPrecondition(failure, reason="NOT_EXECUTED")
        if generation >= self.generation:
            await asyncio.shield(self.ask())
            raise Unavailable("corral is being upgraded; ask again", reason=UNSERVED)

    def on_end(self, number: int) -> None:
        """SIGTERM, SIGINT: the first asks for a clean stop, also in the middle of an upgrade; another one means it.
        Nothing is lost either way: a start recovers."""
        if self._ends:
            log.warning("daemon.killed", signal=signal.Signals(number).name)
            os._exit(128 + number)
        self._ends = True
        self.plan.wanted = False
        self._stop.set()

    def ask(self) -> "asyncio.Task[None]":
        """Check what is on disk, and begin. The task raises FailedPrecondition if that would not start."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._ask(), name="upgrade")
        return self._asked

    async def check(self) -> None:
        """Whether what is on disk would start. Raises FailedPrecondition with what it says."""
        await check(command(self._argv))

    def on_signal(self) -> None:
        """What is wrong is in the log, and the service manager told."""
        self.ask().add_done_callback(_told)

    async def _ask(self) -> None:
        # The host must be there to be handed over, and with it what the program before has left to this one.
        await self._ready.wait()
        if self._stop.is_set():
            return  # it ends already, one way or the other
        await self.check()
        if self._stop.is_set():
            return
        self.plan.wanted = True
        self._stop.set()

    def _on_begin(self) -> None:
        notify_reloading()
        log.info("daemon.upgrading", generation=self.generation)

    def _on_failure(self, e: OSError) -> None:
        self.plan.wanted = False
        log.error("daemon.upgrade_failed", reason=str(e))
        notify(f"STATUS=Not upgraded: {e}")


def _told(asked: "asyncio.Task[None]") -> None:
    if not asked.cancelled() and (error := asked.exception()) is not None:
        log.error("daemon.upgrade_refused", reason=str(error))
        notify(f"STATUS=Not upgraded: {error}")


async def check(program: Sequence[str]) -> None:
    """Whether it would start. Raises FailedPrecondition with what it says."""
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    try:
        process = await asyncio.create_subprocess_exec(
            *program, "--check", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, env=environment,
        )  # fmt: skip
    except OSError as e:
        raise FailedPrecondition(f"{program[0]} cannot be executed: {e.strerror}; this corrald goes on") from e
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            _, errors = await process.communicate()
    except TimeoutError as e:
        process.kill()
        raise FailedPrecondition(f"the new corrald takes longer than {CHECK_TIMEOUT_S:g} s to load") from e
    if process.returncode:
        said = errors.decode("utf-8", "replace").strip().rpartition("\n")[2] or f"it ended with {process.returncode}"
        said = said.removeprefix("corrald: ")
        raise FailedPrecondition(
            f"the new corrald would not start, so this one goes on: {said}", reason="WOULD_NOT_START"
        )


def boot_time_s() -> float:
    """Now, by the clock that /proc/PID/stat counts with."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class NotExecuted:
    """Why this process is still the program that it was, and what it has to go on with."""

    reason: str
    handover: Handover


def execute(
    argv: Sequence[str], locks: Mapping[str, int], waiting: Mapping[Path, socket.socket], generation: int
) -> NotExecuted:
    """Become the program that is on disk, of that generation. Returns only if it can't be executed."""
    sockets = {str(path): each.fileno() for path, each in waiting.items()}
    handover = Handover(locks, sockets, all_kept(), generation, boot_time_s())
    memory = handover.to_memory()
    fds = (memory, *handover.fds())
    for fd in fds:
        os.set_inheritable(fd, True)
    # Until the new program handles it, it would kill.
    signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])
    program = command(argv)
    try:
        os.execve(program[0], program, os.environ | {VARIABLE: str(memory)})  # noqa: S606  # what started us
    except OSError as e:
        reason = f"{program[0]} cannot be executed: {e.strerror}; this corrald goes on"
    for fd in fds:
        os.set_inheritable(fd, False)
    os.close(memory)
    take_back()
    log.error("daemon.upgrade_failed", reason=reason)
    notify(f"STATUS=Not upgraded: {reason}")
    left = {str(path): each.detach() for path, each in waiting.items()}
    return NotExecuted(reason, Handover(waiting=left, generation=generation - 1, began_s=boot_time_s()))


def children() -> Sequence[int]:
    """Of this process, whoever started them: the program before has left its zygote, which stays for its shims."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a kernel without CONFIG_PROC_CHILDREN, where one zombie stays for each upgrade
            found += map(int, (task / "children").read_text("ascii").split())
    return found


async def reap(pid: int) -> None:
    """Wait for a child to end, and let the kernel forget it."""
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    with suppress(OSError), opened(pidfd_open(pid)) as pidfd:
        loop.add_reader(pidfd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(pidfd)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222  # it has ended


async def check_at(address: str) -> None:
    """Whether the process that serves there could be upgraded. Raises CorralError. Earlier versions can't tell."""
    async with open_channel(address) as channel:
        try:
            await version_pb2_grpc.VersionStub(channel).Check(version_pb2.CheckRequest())
        except Unimplemented:
            return
        except CorralError as e:
            raise FailedPrecondition(f"{address}: {e}", reason=e.reason) from e


async def upgrade_at(address: str) -> None:
    """The process that serves there; returns when it serves again. Raises CorralError."""
    async with open_channel(address) as channel:
        stub = version_pb2_grpc.VersionStub(channel)
        try:
            now = await stub.Get(version_pb2.GetRequest())
            await stub.Upgrade(version_pb2.UpgradeRequest(generation=now.generation, only_this=True))
        except CorralError as e:
            raise FailedPrecondition(f"{address}: {e}", reason=e.reason) from e
