"""The beginning of what a process writes, for who runs it only for that and its exit."""

from corral.shim.logs import NoLog
from corral.shim.spool import StreamName


class Excerpt(NoLog):
    """A log that keeps the first bytes, whatever stream they come from."""

    __slots__ = ("_data", "_limit")

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self._limit = limit_bytes
        self._data = bytearray()

    def write(self, stream: StreamName, data: bytes) -> None:
        """Keep what there is room for."""
        self._data += data[: self._limit - len(self._data)]

    @property
    def text(self) -> str:
        """What is kept; what is not UTF-8 becomes U+FFFD."""
        return self._data.decode("utf-8", "replace")
