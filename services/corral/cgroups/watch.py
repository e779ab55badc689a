"""Waiting for OOM kills in all cgroups at once, on the event loop.

All are in one epoll instance, and the loop waits for that: to take one more file into the loop itself costs ten system
calls, and as many again when it goes.
"""

import asyncio
import select
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import structlog

from corral.cgroups.store import Key
from corral.kernel.cgroup import OomWatch, Stats
from corral.rpc.blocking import run_blocking

log = structlog.get_logger()

# A v1 kernel signals that memory ran out before it kills, and does not signal the kill; a v2 kernel also signals
# every time a limit holds. So one look at once and a few later, and in the meantime no more wake-ups.
LOOK_AGAIN_S = (0.0, 0.02, 0.1, 0.5)


@dataclass(slots=True)
class _Entry:
    watch: OomWatch
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    looking: asyncio.Task[None] | None = None


class OomWatcher:
    """Tells a callback the number of OOM kills of a cgroup whenever it grew."""

    def __init__(self, on_kills: Callable[[Key, int], Awaitable[None]]) -> None:
        """on_kills(key, total) runs on the loop, one call at a time for each cgroup."""
        self._on_kills = on_kills
        self._entries: dict[Key, _Entry] = {}
        self._epoll: select.epoll | None = None
        self._waiting: dict[int, tuple[Key, _Entry]] = {}
        """By the descriptor of the watch."""

    def add(self, key: Key, watch: OomWatch, *, look: bool = False) -> None:
        """Watch a cgroup; takes over the watch. look: it knows of kills already that are to be told."""
        entry = self._entries[key] = _Entry(watch)
        self._wait(key, entry)
        if look:
            self._wake(key, entry)

    async def look(self, key: Key) -> None:
        """Tell of the kills that there are now, before somebody removes the cgroup."""
        entry = self._entries.get(key)
        if entry is not None and (kills := await run_blocking(entry.watch.count)):
            await self._on_kills(key, kills)

    def with_kills(self, key: Key, stats: Stats) -> Stats:
        """A reading, with the kills that it can't tell of: a v1 cgroup forgets those of its sub-cgroups with them."""
        entry = self._entries.get(key)
        if entry is None or stats.memory is None or stats.memory.oom_kills >= entry.watch.known:
            return stats
        return replace(stats, memory=replace(stats.memory, oom_kills=entry.watch.known))

    async def take(self, key: Key) -> OomWatch | None:
        """Stop watching a cgroup, and give its watch to the caller, who closes it."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._rest(entry)
        entry.stopped.set()
        if entry.looking is not None:
            await entry.looking
        return entry.watch

    async def close(self) -> None:
        """Stop watching all."""
        for key in list(self._entries):
            if watch := await self.take(key):
                watch.close()
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _wait(self, key: Key, entry: _Entry) -> None:
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._wake_all, self._epoll)
        number = entry.watch.fileno()
        self._epoll.register(number, select.EPOLLIN)
        self._waiting[number] = key, entry

    def _rest(self, entry: _Entry) -> None:
        """Wait for it no longer, if anybody does."""
        number = entry.watch.fileno()
        if self._epoll is not None and self._waiting.pop(number, None) is not None:
            self._epoll.unregister(number)

    def _wake_all(self, epoll: select.epoll) -> None:
        for number, _ in epoll.poll(0):
            self._wake(*self._waiting[number])

    def _wake(self, key: Key, entry: _Entry) -> None:
        self._rest(entry)
        entry.looking = asyncio.get_running_loop().create_task(self._look(key, entry))

    async def _look(self, key: Key, entry: _Entry) -> None:
        try:
            known = 0
            for delay_s in LOOK_AGAIN_S:
                with suppress(TimeoutError):
                    await asyncio.wait_for(entry.stopped.wait(), delay_s)
                if entry.stopped.is_set():
                    return
                kills = await run_blocking(entry.watch.count)
                if kills > known:
                    known = kills
                    await self._on_kills(key, kills)
        except Exception:  # of one cgroup: the others are still watched
            log.exception("cgroup.oom_watch_failed", namespace=key.namespace, id=key.id)
            return
        if not entry.stopped.is_set():
            self._wait(key, entry)
