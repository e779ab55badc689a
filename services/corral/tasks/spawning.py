"""From a bundle to a shim that holds a created container, and back.

The listening socket exists before the shim does: the daemon connects and sends hello, subscribe and create at once,
while the zygote still forks. So the socket also tells the truth: a connection to it is refused when nobody holds
it: then no shim lives, and none is about to.
"""

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass

import structlog

from corral.kernel.failpoint import failpoint
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import CorralError, Internal, Unavailable
from corral.shim.wire import Message
from corral.tasks.bundle import Bundle
from corral.tasks.connection import ConnectionLostError
from corral.tasks.identity import Identity
from corral.tasks.shim import Shim
from corral.tasks.standby import Standby
from corral.tasks.zygote import Zygote, order

log = structlog.get_logger()

ATTEMPTS = 3
UNDO_S = 10.0
# What a zygote held that has ended is closed by then.
HANG_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class Spawned:
    """A shim that holds a created container."""

    shim: Shim
    identity: Identity
    init: Identity


class Spawner:
    """Makes shims, at most `parallel` at once."""

    def __init__(self, zygote: Zygote, standby: Standby, *, parallel: int, timeout_s: float) -> None:
        self._zygote = zygote
        self._standby = standby
        self._turn = asyncio.Semaphore(parallel)
        self._timeout_s = timeout_s

    async def spawn(self, bundle: Bundle, config: bytes, fields: Message) -> Spawned:
        """Make the bundle, a shim and its container.

        Raises FileExistsError if there is such a bundle, CorralError, OSError; then nothing is left behind.
        """
        async with self._turn:
            listener = bundle.make(config)
            try:
                with listener:
                    failpoint("tasks.create.after_bundle")
                    return await self._spawn(bundle, listener, fields)
            except BaseException:
                await undo(bundle, timeout_s=UNDO_S)
                raise

    async def spawn_heir(self, bundle: Bundle) -> tuple[Shim, Identity]:
        """A shim for a bundle whose own was killed; it has adopted nothing yet. Raises CorralError, OSError."""
        async with self._turn:
            for _ in range(ATTEMPTS):
                await self._until_ready()
                with bundle.listen() as listener:
                    shim = Shim(bundle.connect(), timeout_s=self._timeout_s)
                    try:
                        return shim, await self._fork(bundle, listener)
                    except (
                        ConnectionLostError
                    ):  # the zygote died, perhaps before it forked: this socket is not used again
                        await end_unused(shim)
                    except BaseException:
                        shim.close()
                        raise
        raise Unavailable("no shim could be started: its zygote keeps dying; see zygote.log", reason="ZYGOTE_DIES")

    async def _spawn(self, bundle: Bundle, listener: socket.socket, fields: Message) -> Spawned:
        if spawned := await self._by_standby(bundle, listener, fields):
            return spawned
        for attempt in range(ATTEMPTS):
            if listener.fileno() < 0:  # who had it has ended
                log.warning("shim.not_forked", attempt=attempt)
                listener = bundle.listen()
            with listener:
                spawned = await self._try(bundle, listener, fields)
            if spawned is not None:
                return spawned
        raise Unavailable("no shim could be started: its zygote keeps dying; see zygote.log", reason="ZYGOTE_DIES")

    async def _by_standby(self, bundle: Bundle, listener: socket.socket, fields: Message) -> Spawned | None:
        """By the shim that stands by; None if there is none, or it ended before it had the bundle."""
        ready = self._standby.take()
        if ready is None:
            return None
        shim, identity = ready
        try:
            taken = shim.take(order(bundle), listener)
            listener.close()  # as in _fork()
            init = await shim.create(fields)
            failpoint("tasks.create.after_spawn")
            return Spawned(shim, identity, init)
        except CorralError as e:
            is_stuck, refusal = not taken.done(), taken.exception() if taken.done() else None
            shim.close()
            if isinstance(refusal, ConnectionLostError):
                return None
            if is_stuck:  # it must not take the bundle later
                await identity.kill(within_s=UNDO_S)
            raise refusal or _cause(identity, e) from None
        except BaseException:
            shim.close()
            raise

    async def _try(self, bundle: Bundle, listener: socket.socket, fields: Message) -> Spawned | None:
        """One attempt; None if the zygote died before it forked."""
        await self._until_ready()
        shim = Shim(bundle.connect(), timeout_s=self._timeout_s)
        try:
            forked, init = await asyncio.gather(
                self._fork(bundle, listener), shim.create(fields), return_exceptions=True
            )
            failpoint("tasks.create.after_spawn")
            if isinstance(init, Identity):
                identity = forked if isinstance(forked, Identity) else await _identify(shim, bundle)
                return Spawned(shim, identity, init)
            if isinstance(forked, ConnectionLostError) and await _hangs_up(shim):
                return None
            raise _cause(forked, init)
        except BaseException:
            shim.close()
            raise

    async def _until_ready(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._zygote.ready()
        except TimeoutError as e:
            why = f"no shim could be started: its zygote was not ready within {self._timeout_s:g} s; see zygote.log"
            raise Unavailable(why, reason="ZYGOTE_NOT_READY") from e

    async def _fork(self, bundle: Bundle, listener: socket.socket) -> Identity:
        try:
            return await self._zygote.spawn(bundle, listener, timeout_s=self._timeout_s)
        finally:
            # From here on it is held by the shim alone, so whoever waits for a shim that never came is told.
            listener.close()


async def _hangs_up(shim: Shim) -> bool:
    """Of a shim whose zygote is dead: whether nobody holds its socket, so that there is none."""
    with suppress(TimeoutError):
        async with asyncio.timeout(HANG_UP_S):
            await shim.closed.wait()
    return not shim.is_open


def _cause(forked: Identity | BaseException, init: BaseException) -> BaseException:
    """What to report: the zygote's refusal explains the shim's silence."""
    if isinstance(forked, ConnectionLostError):
        return Unavailable(f"the zygote did not fork a shim: {forked}", reason="ZYGOTE_STUCK")
    if isinstance(forked, BaseException):
        return forked
    if isinstance(init, Unavailable):
        return Internal(f"the shim died while it made the container: {init}; see zygote.log", reason="SHIM_DIED")
    return init


async def _identify(shim: Shim, bundle: Bundle) -> Identity:
    """The shim that answers, when the zygote died before it could say."""
    report = await shim.state()
    record = await run_blocking(bundle.record)  # which it has written by the time that it answers anything further
    if record.shim is None or record.shim.pid != report.shim_pid:
        raise Internal("the shim's record does not name it", reason="SHIM_RECORD")
    return record.shim


async def undo(bundle: Bundle, *, timeout_s: float) -> None:
    """End whatever a bundle holds, and remove it. Raises Unavailable if a process of it cannot be ended."""
    failpoint("tasks.undo.before")
    await end_shim(bundle, timeout_s=timeout_s)
    record = await run_blocking(bundle.record)
    for identity in (record.shim, record.init):
        if identity is not None and not await identity.kill(within_s=timeout_s):
            raise Unavailable(f"process {identity.pid} cannot be killed; it is in the kernel", reason="UNKILLABLE")
    bundle.discard()
    failpoint("tasks.undo.after")


async def end_shim(bundle: Bundle, *, timeout_s: float) -> None:
    """Ask the bundle's shim, if there is one, to kill what it holds and to end; returns when it has hung up."""
    try:
        sock = bundle.connect()
    except (ConnectionRefusedError, FileNotFoundError):
        return
    shim = Shim(sock, timeout_s=timeout_s)
    gone = asyncio.Event()
    shim.follow(lambda _exec_id, _how: None, gone.set)
    try:
        with suppress(CorralError, TimeoutError):
            await shim.delete()
            async with asyncio.timeout(timeout_s):
                await gone.wait()
    finally:
        shim.close()


async def end_unused(shim: Shim) -> None:
    """End a shim that holds no container, if it is there at all, and hang up."""
    with suppress(CorralError):
        await shim.delete()
    shim.close()
