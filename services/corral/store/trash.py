"""Directories on their way out: renamed away at once, removed a moment later, many in one go.

So a name is free as soon as its owner is forgotten, and nobody waits while a tree is taken apart. What a crash leaves
in the trash is removed at the next start.
"""

import asyncio
import errno
import os
import secrets
import shutil
from pathlib import Path

# Long enough for the directories of one container, and of its neighbours, to go together.
PAUSE_S = 0.15
REMOVE_ATTEMPTS = 3


class Trash:
    """One directory of trash, on the file system of what is thrown into it. Use within one event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._emptying: asyncio.Task[None] | None = None
        self._is_full = False  # something was thrown in since it was last emptied

    def throw(self, directory: Path) -> None:
        """Free the name of a directory; no error if there is none. Does not wait for a disk. Raises OSError."""
        self.discard(directory)
        self._is_full = True
        if self._emptying is None or self._emptying.done():
            self._emptying = asyncio.ensure_future(self._empty_soon())

    def discard(self, directory: Path) -> None:
        """throw() for threads and start-up code: what was discarded stays until empty()."""
        target = f"{self.path}/{secrets.token_hex(8)}"
        try:
            os.rename(directory, target)  # noqa: PTH104 - in the path of every deletion
        except FileNotFoundError:
            if not directory.exists():
                return
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.rename(target)

    async def _empty_soon(self) -> None:
        while self._is_full:
            await asyncio.sleep(PAUSE_S)
            self._is_full = False
            await asyncio.to_thread(self.empty)

    def empty(self) -> None:
        """Remove all that is in it. Blocks."""
        try:
            thrown = os.listdir(self.path)  # noqa: PTH208 - names are wanted
        except FileNotFoundError:
            return
        for name in thrown:
            remove_tree(self.path / name)

    async def close(self) -> None:
        """Remove what was thrown away just now."""
        if self._emptying is not None:
            self._emptying.cancel()
            await asyncio.gather(self._emptying, return_exceptions=True)
            await asyncio.to_thread(self.empty)


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
