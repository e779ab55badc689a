"""Where a stream was when its daemon executed itself anew."""

from collections.abc import Iterable, Iterator

from corral.api.tasks.v1 import tasks_pb2


class LogPosition:
    """How far a log was read: up to a moment, and so many lines of that very moment."""

    def __init__(self, request: tasks_pb2.LogsRequest) -> None:
        self._request = request
        self._last: tuple[int, int] | None = None
        self._read = 0  # with the time of the last
        self._known = 0  # of those, what comes once more

    def new(self, entries: Iterable[tasks_pb2.LogEntry]) -> Iterator[tasks_pb2.LogEntry]:
        """Those that were not read before."""
        for entry in entries:
            moment = (entry.time.seconds, entry.time.nanos)
            if self._known and moment == self._last:
                self._known -= 1
                continue
            self._known = 0
            self._read = self._read + 1 if moment == self._last else 1
            self._last = moment
            yield entry

    def rest(self) -> tasks_pb2.LogsRequest:
        """What to ask for to go on."""
        request = tasks_pb2.LogsRequest()
        request.CopyFrom(self._request)
        if self._last is not None:
            request.since.seconds, request.since.nanos = self._last
            request.ClearField("tail")
            self._known = self._read
        return request
