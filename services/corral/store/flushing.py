"""Having the log of a database reach the disk, while others go on writing to it.

A thread of its own waits for the disk, from the first time that somebody asks. One wait is for all who have asked by
then, as of many containers that are made at once.
"""

import asyncio
import os
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

type Asked = asyncio.Future[None]


class Flushing:
    """Of one log."""

    def __init__(self, log: Path) -> None:
        """`log`: is there by the time that somebody asks, and never another file."""
        self._log = log
        self._fd = -1
        self._asked: SimpleQueue[Asked | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def flush(self) -> None:
        """Return once all that is in it by now survives a power loss. Raises OSError."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"flush-{self._log.stem}", daemon=True)
            self._thread.start()
        asked: Asked = asyncio.get_running_loop().create_future()
        self._asked.put(asked)
        await asked

    def close(self) -> None:
        """Whoever has asked is told before; harmless when repeated."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()
            self._thread = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _run(self) -> None:
        ends = False
        while not ends:
            asked = [self._asked.get()]
            while not self._asked.empty():
                asked.append(self._asked.get())
            ends = None in asked
            waiting = [each for each in asked if each is not None]
            if waiting:
                _tell(waiting, self._try())

    def _try(self) -> OSError | None:
        try:
            if self._fd < 0:
                self._fd = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)
            os.fdatasync(self._fd)
        except OSError as e:
            return e
        return None


def _tell(waiting: list[Asked], error: OSError | None) -> None:
    for each in waiting:
        with suppress(RuntimeError):  # its loop is closed: nobody waits any more
            each.get_loop().call_soon_threadsafe(_settle, each, error)


def _settle(asked: Asked, error: OSError | None) -> None:
    if asked.done():
        return
    if error is None:
        asked.set_result(None)
    else:
        asked.set_exception(error)
