"""Waiting for pressure in all cgroups at once, on the event loop."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from corral.api.types.v1 import types_pb2
from corral.cgroups.store import Key
from corral.kernel.cgroup import Cgroup, PressureTrigger, PressureWatch
from corral.rpc.errors import InvalidArgument

log = structlog.get_logger()

REST_S = 10.0
"""The least time between two events of one trigger: pressure that stays should not fill the journal."""

MOST = 6
"""Triggers of one cgroup: one for each resource, of some and of all processes. The kernel works for each of them."""


def check(message: types_pb2.Resources) -> None:
    """Raises InvalidArgument for more triggers than one cgroup may have."""
    if (count := len(message.pressure.triggers)) > MOST:
        raise InvalidArgument(
            f"{count} triggers of pressure are too many: ask for at most {MOST}", reason="TOO_MANY_TRIGGERS"
        )


def triggers(message: types_pb2.Resources) -> tuple[PressureTrigger, ...]:
    """Those that a message asks for."""
    return tuple(
        PressureTrigger(each.resource, each.stall_us, each.window_us, each.full) for each in message.pressure.triggers
    )


def open_all(group: Cgroup, wanted: Iterable[PressureTrigger]) -> Sequence[PressureWatch]:
    """A watch for each, or none and an OSError."""
    watches: list[PressureWatch] = []
    try:
        for trigger in wanted:
            watches.append(group.watch_pressure(trigger))  # noqa: PERF401 - those before are closed if one fails
    except BaseException:
        close_all(watches)
        raise
    return watches


def close_all(watches: Iterable[PressureWatch]) -> None:
    """Close each."""
    for watch in watches:
        watch.close()


@dataclass(slots=True)
class _Entry:
    watch: PressureWatch
    rest: asyncio.TimerHandle | None = None


class PressureWatcher:
    """Tells a callback which trigger of which cgroup was reached."""

    def __init__(self, on_pressure: Callable[[Key, PressureTrigger], Awaitable[None]]) -> None:
        """on_pressure runs on the loop."""
        self._on_pressure = on_pressure
        self._entries: dict[Key, list[_Entry]] = {}
        self._telling: set[asyncio.Task[None]] = set()

    def put(self, key: Key, watches: Sequence[PressureWatch]) -> None:
        """Watch a cgroup by these instead of those before; takes them over."""
        self.drop(key)
        if watches:
            self._entries[key] = [_Entry(watch) for watch in watches]
            for entry in self._entries[key]:
                self._wait(key, entry)

    def drop(self, key: Key) -> None:
        """Watch a cgroup no longer."""
        for entry in self._entries.pop(key, ()):
            asyncio.get_running_loop().remove_reader(entry.watch.fileno())
            if entry.rest is not None:
                entry.rest.cancel()
            entry.watch.close()

    async def close(self) -> None:
        """Watch nothing any more; what was seen is told."""
        for key in list(self._entries):
            self.drop(key)
        if self._telling:
            await asyncio.wait(self._telling)

    def _wait(self, key: Key, entry: _Entry) -> None:
        entry.rest = None
        asyncio.get_running_loop().add_reader(entry.watch.fileno(), self._wake, key, entry)

    def _wake(self, key: Key, entry: _Entry) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(entry.watch.fileno())
        if entry.watch.is_gone():
            return
        entry.rest = loop.call_later(REST_S, self._wait, key, entry)
        task = loop.create_task(self._tell(key, entry.watch.trigger))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, key: Key, trigger: PressureTrigger) -> None:
        try:
            await self._on_pressure(key, trigger)
        except Exception:  # of one cgroup: the others are still watched
            log.exception("cgroup.pressure_not_told", namespace=key.namespace, id=key.id)
