"""A stream of bytes in chunks, read as a tar reader needs it."""

import queue
import threading
from collections.abc import Generator, Iterator

from corral.images.layers.errors import Truncated


class ByteStream:
    """Exact reads over an iterator of chunks, copying only what crosses a chunk's end."""

    __slots__ = ("_chunk", "_chunks", "_end", "_position", "offset")

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")
        self._position = 0
        self._end = 0
        self.offset = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; b"" if the stream has ended right here. Raises Truncated if it ends in the middle."""
        position = self._position
        if size <= self._end - position:
            self._position = position + size
            self.offset += size
            return self._chunk[position : position + size].tobytes()
        parts = [bytes(view) for view in self.views(size, may_end=True)]
        data = b"".join(parts)
        if data and len(data) != size:
            raise Truncated("it ends in the middle of an entry: it was cut off")
        return data

    def views(self, size: int, *, may_end: bool = False) -> Iterator[memoryview]:
        """The next `size` bytes as they come, without copying. Raises Truncated if there are fewer."""
        while size:
            left = self._end - self._position
            if not left:
                if not self._next():
                    if may_end:
                        return
                    raise Truncated("it ends in the middle of a file: it was cut off")
                continue
            taken = min(left, size)
            view = self._chunk[self._position : self._position + taken]
            self._position += taken
            self.offset += taken
            size -= taken
            yield view

    def skip(self, size: int) -> None:
        for _ in self.views(size):
            pass

    def drain(self) -> None:
        """Read to the end."""
        while True:
            self.offset += self._end - self._position
            self._position = self._end
            if not self._next():
                return

    def _next(self) -> bool:
        for chunk in self._chunks:
            if chunk:
                self._chunk = memoryview(chunk)
                self._position, self._end = 0, len(chunk)
                return True
        return False


def prefetched(chunks: Iterator[bytes], *, depth: int = 4) -> Generator[bytes]:
    """The same chunks, made by a thread that works ahead: reading, hashing and decoding release the GIL.

    Whoever may not read to the end closes it, which ends the thread.
    """
    ahead: queue.Queue[bytes | BaseException | None] = queue.Queue(depth)
    given_up = threading.Event()

    def work() -> None:
        try:
            for chunk in chunks:
                ahead.put(chunk)
                if given_up.is_set():
                    return
            ahead.put(None)
        except BaseException as e:  # noqa: BLE001  it is raised again where the chunks are used
            ahead.put(e)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        given_up.set()
        while thread.is_alive():
            try:
                ahead.get(timeout=0.05)
            except queue.Empty:
                continue
