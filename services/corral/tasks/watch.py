"""Waking those who follow files: one inotify descriptor for any number of directories and followers."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from corral.kernel import inotify

MASK = inotify.IN_MODIFY | inotify.IN_CREATE | inotify.IN_MOVED_TO


class DirectoryWatch:
    """Use within one event loop, from the first call of changes() to close()."""

    def __init__(self) -> None:
        self._fd = -1
        self._events: dict[int, list[asyncio.Event]] = {}

    @contextmanager
    def changes(self, directory: Path) -> Iterator[asyncio.Event]:
        """An event that is set whenever a file in the directory grows, appears or takes another's name.

        Raises OSError, ENOSPC among others when the user's watches are used up.
        """
        if self._fd < 0:
            self._fd = inotify.open_inotify()
            asyncio.get_running_loop().add_reader(self._fd, self._readable)
        event = asyncio.Event()
        watch = inotify.add_watch(self._fd, directory, MASK)
        self._events.setdefault(watch, []).append(event)
        try:
            yield event
        finally:
            self._remove(watch, event)

    def close(self) -> None:
        """Nobody is woken any more."""
        fd, self._fd = self._fd, -1
        self._events.clear()
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def _remove(self, watch: int, event: asyncio.Event) -> None:
        events = self._events.get(watch, [])
        if event in events:
            events.remove(event)
        if not events and self._events.pop(watch, None) is not None:
            with suppress(OSError):  # the directory is gone, and the watch with it
                inotify.remove_watch(self._fd, watch)

    def _readable(self) -> None:
        for change in inotify.read_changes(self._fd):
            lost = change.mask & inotify.IN_Q_OVERFLOW
            for events in tuple(self._events.values()) if lost else (self._events.get(change.watch, ()),):
                for event in events:
                    event.set()
