"""A shim that stands by: forked, connected, and waiting to be told which bundle is its own.

So who creates a container waits neither for the zygote nor for a shim to wake up and begin. There is one at most, made
once nothing has been created for a moment: while much is, the processors have better to do. It ends with its connection
or its zygote, and until it is given a bundle it has made nothing.
"""

import asyncio
import contextvars
import socket

import structlog

from corral.rpc.errors import CorralError
from corral.tasks.connection import ConnectionLostError
from corral.tasks.identity import Identity
from corral.tasks.shim import Shim
from corral.tasks.zygote import Zygote

log = structlog.get_logger()

QUIET_S = 0.05


class Standby:
    """Keeps one, from begin() to close()."""

    def __init__(self, zygote: Zygote, *, timeout_s: float) -> None:
        self._zygote = zygote
        self._timeout_s = timeout_s
        self._ready: tuple[Shim, Identity] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._making: asyncio.Task[None] | None = None
        self._closed = False

    def begin(self) -> None:
        """Have one made soon, if there is none. What is asked for again waits again."""
        if self._closed or self._ready is not None or self._making is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop, nobodys = asyncio.get_running_loop(), contextvars.Context()
        self._timer = loop.call_later(QUIET_S, self._begin, context=nobodys)

    def take(self) -> tuple[Shim, Identity] | None:
        """The one that stands by, the caller's from here on; another one is made soon."""
        ready, self._ready = self._ready, None
        self.begin()
        return ready if ready is not None and ready[0].is_open else None

    async def close(self) -> None:
        """End it."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._making is not None:
            self._making.cancel()
            await asyncio.wait((self._making,))
        if self._ready is not None:
            self._ready[0].close()
            self._ready = None

    def _begin(self) -> None:
        self._making = asyncio.create_task(self._make(), name="standby")

    async def _make(self) -> None:
        try:
            await self._zygote.ready()
            self._ready = await self._stand_by()
        except (ConnectionLostError, CorralError, OSError) as e:  # who creates next does without
            log.debug("standby.not_made", error=str(e))
        finally:
            self._making = None

    async def _stand_by(self) -> tuple[Shim, Identity]:
        ours, theirs = socket.socketpair()
        with theirs:
            shim = Shim(ours, timeout_s=self._timeout_s)
            try:
                return shim, await self._zygote.stand_by(theirs, timeout_s=self._timeout_s)
            except BaseException:
                shim.close()
                raise
