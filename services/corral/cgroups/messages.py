"""Readings as messages, made anew only for those that have changed."""

from collections.abc import Iterable

from corral.api.cgroups.v1 import cgroups_pb2
from corral.cgroups import wire
from corral.cgroups.store import Key
from corral.kernel.cgroup import Stats
from corral.rpc.events import NS_PER_S

MOST = 2048
"""Readings whose messages are kept."""


class Messages:
    """For one event loop."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[Stats, bytes]] = {}

    def response(self, readings: Iterable[tuple[Key, int, Stats]]) -> cgroups_pb2.StatsResponse:
        """One answer of all of them. Each is a key, a time in nanoseconds and what was read then."""
        response = cgroups_pb2.StatsResponse()
        for key, read_ns, stats in readings:
            message = response.stats.add()
            message.ParseFromString(self._content(key, stats))
            message.read_at.seconds, message.read_at.nanos = divmod(read_ns, NS_PER_S)
        return response

    def _content(self, key: Key, stats: Stats) -> bytes:
        """The message but for its time."""
        known = self._known.get(key)
        if known is not None and known[0] is stats:
            return known[1]
        content = wire.stats(key.id, stats).SerializeToString()
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[key] = stats, content
        return content
