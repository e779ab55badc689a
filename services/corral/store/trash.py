"""Directories on their way out: renamed away at once, removed a moment later, many in one go.

So a name is free as soon as its owner is forgotten, and nobody waits while a tree is taken apart. What a crash leaves
in the trash is removed at the next start.
"""

import asyncio
import contextvars
import errno
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

import structlog

log = structlog.get_logger()

# Long enough for the directories of one container, and of its neighbours, to go together.
PAUSE_S = 0.15
REMOVE_ATTEMPTS = 3


class Trash:
    """One directory of trash, on the file system of what is thrown into it. Use within one event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._emptying: _Emptying | None = None

    def throw(self, directory: Path | str) -> None:
        """Free the name of a directory; no error if there is none. Does not wait for a disk. Raises OSError."""
        self.discard(directory)
        if self._emptying is None:
            self._emptying = _emptying.setdefault(asyncio.get_running_loop(), _Emptying())
        self._emptying.add(self)

    def discard(self, directory: Path | str) -> None:
        """throw() for threads and start-up code: what was discarded stays until empty()."""
        target = f"{self.path}/{secrets.token_hex(8)}"
        try:
            os.rename(directory, target)  # noqa: PTH104 - in the path of every deletion
        except FileNotFoundError:
            if not os.path.exists(directory):  # noqa: PTH110 - it may be a string
                return
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.rename(directory, target)  # noqa: PTH104

    def empty(self) -> None:
        """Remove all that is in it, as far as that can be removed. Blocks. Raises OSError for the rest."""
        try:
            thrown = os.listdir(self.path)  # noqa: PTH208 - names are wanted
        except FileNotFoundError:
            return
        errors = []
        for name in thrown:
            try:
                remove_tree(self.path / name)
            except OSError as e:
                errors.append(e)
        if errors:
            raise errors[0]

    def empty_or_report(self) -> None:
        """empty() for start-up code, which goes on without."""
        try:
            self.empty()
        except OSError as e:
            log.warning("trash.not_emptied", path=str(self.path), error=str(e))

    async def close(self) -> None:
        """Remove what was thrown away just now."""
        if self._emptying is not None:
            self._emptying.full.discard(self)
            await asyncio.to_thread(self.empty)


class _Emptying:
    """Of all the trash of one event loop: a container throws into several, and they are emptied together."""

    def __init__(self) -> None:
        self.full: set[Trash] = set()
        """Where something was thrown in since it was last emptied."""
        self._task: asyncio.Task[None] | None = None

    def add(self, trash: Trash) -> None:
        self.full.add(trash)
        if self._task is None:
            # It outlasts the request that it is begun in, and has no part in what is said of that.
            self._task = asyncio.get_running_loop().create_task(self._empty_soon(), context=contextvars.Context())

    async def _empty_soon(self) -> None:
        try:
            while self.full:
                await asyncio.sleep(PAUSE_S)
                full, self.full = self.full, set()
                try:
                    errors = await asyncio.to_thread(_empty_each, full)
                except RuntimeError as e:  # there can be no thread now: all of it goes with what is thrown away next
                    self.full |= full
                    _tell(e)
                    return
                for error in errors:
                    _tell(error)
        finally:
            self._task = None


_emptying: WeakKeyDictionary[asyncio.AbstractEventLoop, _Emptying] = WeakKeyDictionary()


def _tell(error: Exception) -> None:
    problem = {"message": "trash was not emptied", "exception": error}
    asyncio.get_running_loop().call_exception_handler(problem)


def _empty_each(trashes: Iterable[Trash]) -> list[OSError]:
    """Returns what went wrong with those that could not be emptied."""
    errors = []
    for trash in trashes:
        try:
            trash.empty()
        except OSError as e:
            errors.append(e)
    return errors


def remove_tree(path: Path) -> None:
    """Remove a directory of ours with all in it; no error if there is none. Blocks. Links are not followed.

    Somebody may still be writing its last file in there. Raises OSError.
    """
    for attempt in range(1, REMOVE_ATTEMPTS + 1):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            if not path.exists():
                return
        except OSError as e:
            if e.errno != errno.ENOTEMPTY or attempt == REMOVE_ATTEMPTS:
                raise
        else:
            return
