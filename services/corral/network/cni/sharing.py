"""Which engines of this host have networks of which names, as plugins of CNI tell networks by their names alone.

    <directory>/<name>/<id of a network>    a line: the root of the engine that has it
    <directory>/<name>                      locked (flock): shared while ADD goes on, exclusively during GC

GC makes plugins forget all that the caller does not name, so it is not asked for where another engine has a network of
that name, running or not. Nobody can tell whether one that is not to be seen is gone, or in a file system that is not
mounted now, so what it said counts until somebody deletes it. What ADD makes is said before, and so the answer holds
until GC has ended.

Source: CNI specification 1.1, section 4, "GC" and section 1 ("disableGC"); flock(2).
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.rpc.errors import Unavailable

PAUSE_S, PATIENCE_S = 0.05, 120.0


@dataclass(frozen=True, slots=True)
class SharedNames:
    """See the module. root: of this engine."""

    directory: Path
    root: Path

    def claim(self, name: str, network_id: str) -> None:
        """Tell others that this engine has such a network; no error if it has done so. Raises OSError."""
        told = self._made(name) / network_id
        try:
            told.write_text(self._line())
        except FileNotFoundError:  # another's last network of that name has just gone
            (self._made(name) / network_id).write_text(self._line())

    def _line(self) -> str:
        return f"{self.root.resolve()}\n"

    def _made(self, name: str) -> Path:
        where = self.directory / name
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        return where

    def release(self, name: str, network_id: str) -> None:
        """It has no more; no error if it had not."""
        where = self.directory / name
        (where / network_id).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            where.rmdir()

    def others(self, name: str) -> Sequence[str]:
        """The roots of other engines that have one, or said so and are not to be seen. Raises OSError."""
        where = self.directory / name
        said = {path.read_text() for path in where.iterdir()} if where.is_dir() else set()
        return sorted(line.strip() for line in said - {self._line()})

    @contextlib.asynccontextmanager
    async def in_use(self, name: str, network_id: str) -> AsyncIterator[None]:
        """Nobody collects within the block, nor after it without knowing of this network. Raises Unavailable,
        OSError."""
        deadline = time.monotonic() + PATIENCE_S
        while (held := self._lock(name, fcntl.LOCK_SH)) is None:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"another engine of this host has had plugins of CNI look through network {name!r} for"
                    f" {PATIENCE_S:.0f} seconds: see what keeps them, and try again"
                )
            await asyncio.sleep(PAUSE_S)
        try:
            self.claim(name, network_id)
            yield
        finally:
            os.close(held)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[bool]:
        """Tells whether nobody uses the name, and nobody begins to within the block. Raises OSError."""
        held = self._lock(name, fcntl.LOCK_EX)
        try:
            yield held is not None
        finally:
            if held is not None:
                os.close(held)

    def _lock(self, name: str, how: int) -> int | None:
        """Returns a descriptor that holds the lock; None while that cannot be."""
        where = self._made(name)
        descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.ExitStack() as unless_held:
            unless_held.callback(os.close, descriptor)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), where.stat()):  # not one that was deleted meanwhile
                    unless_held.pop_all()
                    return descriptor
        return None
