"""Attaching a client to a process: pipes whose other ends the shim holds.

    process --FIFO--> shim --pipe--> here --gRPC--> client
    process <--pipe-- shim <--pipe-- here <--gRPC-- client

Each step waits for the next one, so it is the process that waits for a lossless client that does not read.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self

from corral.rpc.errors import FailedPrecondition, NotFound, Unavailable
from corral.tasks.live import Process, Task

CHUNK = 256 << 10
PIPE_SIZE = 1 << 20
JUST_ENDED_S = 2.0


class Stream(Enum):
    """Which output."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client attaches to."""

    stdin: bool
    stdout: bool
    stderr: bool
    lossless: bool
    replay: bool


class Attachment:
    """Our ends of one client's pipes; closed by close(), the context manager's exit."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outputs: dict[Stream, int] = {}
        self._stdin = -1
        self._wake: Callable[[], None] = _nobody
        self.detached = False

    @classmethod
    async def open(cls, task: Task, process: Process, wanted: Wanted) -> Self:
        """Attach; nothing that the process writes from now on is missed. One that has ended has no output left.

        Raises CorralError.
        """
        attachment = cls()
        try:
            await attachment._attach(task, process, wanted)
        except BaseException:
            attachment.close()
            raise
        return attachment

    async def _attach(self, task: Task, process: Process, wanted: Wanted) -> None:
        if process.ended.is_set():
            return
        fields: dict[str, object] = {"lossless": wanted.lossless, "replay": wanted.replay}
        theirs = self._make_pipes(process, wanted, fields)
        try:
            # From here on the connection owns their ends, whatever happens.
            await task.connected().attach(process.row.exec_id, fields, theirs)
        except (FailedPrecondition, NotFound, Unavailable):
            self.close()
            if not await process.has_ended(within_s=JUST_ENDED_S):
                raise
            # It ended at this moment, and that is no error.

    def _make_pipes(self, process: Process, wanted: Wanted, fields: dict[str, object]) -> list[int]:
        """Make the pipes wanted; returns the shim's ends in the order of the wire."""
        theirs = []
        try:
            if wanted.stdin and process.row.stdin:
                reader, self._stdin = _pipe()
                theirs.append(reader)
                fields |= {"stdin": True, "stdin_once": process.row.stdin_once}
            for stream, asked in ((Stream.STDOUT, wanted.stdout), (Stream.STDERR, wanted.stderr)):
                if asked and not (stream is Stream.STDERR and process.row.terminal):
                    self._outputs[stream], writer = _pipe()
                    theirs.append(writer)
                    fields[stream.value] = True
        except BaseException:
            for fd in theirs:
                os.close(fd)
            raise
        for fd in (self._stdin, *self._outputs.values()):
            if fd >= 0:
                os.set_blocking(fd, False)
        return theirs

    async def output(self) -> AsyncGenerator[tuple[Stream, bytes]]:
        """Chunks as they come, up to 256 KiB each, until the shim has closed every stream."""
        while self._outputs and not self.detached:
            idle = True
            for stream, fd in tuple(self._outputs.items()):
                try:
                    data = os.read(fd, CHUNK)
                except BlockingIOError:
                    continue
                idle = False
                if data:
                    yield stream, data
                else:
                    del self._outputs[stream]
                    os.close(fd)
            if idle:
                await self._readable()

    async def _readable(self) -> None:
        ready = self._loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        fds = tuple(self._outputs.values())
        for fd in fds:
            self._loop.add_reader(fd, wake)
        self._wake = wake
        try:
            await ready
        finally:
            self._wake = _nobody
            for fd in fds:
                self._loop.remove_reader(fd)

    async def write_stdin(self, data: bytes) -> None:
        """Pass on all of data once there is room; what nobody wants any more is thrown away."""
        view = memoryview(data)
        while view and self._stdin >= 0:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                await self._writable()
            except BrokenPipeError:
                self.close_stdin()

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        fd = self._stdin
        self._loop.add_writer(fd, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            self._loop.remove_writer(fd)

    def close_stdin(self) -> None:
        """No more stdin from this client."""
        fd, self._stdin = self._stdin, -1
        if fd >= 0:
            os.close(fd)

    def detach(self) -> None:
        """What was written to stdin still arrives; output() ends."""
        self.detached = True
        self.close_stdin()
        self._wake()

    def close(self) -> None:
        """Close our ends; harmless when repeated."""
        self.close_stdin()
        while self._outputs:
            os.close(self._outputs.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _nobody() -> None:
    """Nobody waits for output."""


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    with suppress(OSError):  # a user who has many pipes already is not given large ones; it works with small ones
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return reader, writer
