"""Attaching a client to a process: pipes whose other ends the shim holds.

    process --FIFO--> shim --pipe--> here --gRPC--> client
    process <--pipe-- shim <--pipe-- here <--gRPC-- client

Each step waits for the next one, so it is the process that waits for a lossless client that does not read.

A client on this host may take our ends of the pipes over, and is then left to itself.
"""

import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType
from typing import Self

from corral.rpc.errors import FailedPrecondition, NotFound, Unavailable
from corral.shim.wire import Message
from corral.tasks.happening import Happening, first_of
from corral.tasks.live import STDIN, Process, Task
from corral.tasks.shim import Shim

CHUNK = 256 << 10
READER = "stdin.reader"
TAKER_PREFIX = "corral-"
_UCRED = struct.Struct("=iII")
PIPE_SIZE = 1 << 20
JUST_ENDED_S = 2.0
# How long after one of its pipes a dead shim's socket is seen to be closed, at most.
HANG_UP_S = 0.1


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


@dataclass(frozen=True, slots=True)
class Taker:
    """A client that listens at an abstract socket for stdin's pipe, or the output's. Fields as in proto Take."""

    name: str
    secret: bytes
    pid: int
    stdin: bool

    def give(self, fds: Sequence[int]) -> bool:
        """Send it copies; whether it will find them there."""
        if not self.name.startswith(TAKER_PREFIX):
            return False
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.setblocking(False)
                connection.connect(f"\0{self.name}")
                pid, _, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
                if pid != self.pid:
                    return False
                socket.send_fds(connection, [self.secret], fds)
        except (OSError, ValueError):
            return False
        return True


class Attachment:
    """Our ends of one client's pipes; closed by close(), the context manager's exit.

    Should the shim be killed, its heir gets the same pipe of input, with what is in it, and new ones for output: what
    the dead one had taken and not passed on does not reach this client, and is in the log.
    """

    def __init__(self, task: Task, process: Process, wanted: Wanted) -> None:
        self._loop = asyncio.get_running_loop()
        self._task, self._process, self._wanted = task, process, wanted
        self._shim: Shim | None = None
        self._shim_identity = task.shim_identity
        self._again, self._still = Happening(), asyncio.Event()
        self._still.set()
        self._outputs: dict[Stream, int] = {}
        self._stdin = self._reader = -1  # both ends: the reader is a copy, for an heir
        self._wake: Callable[[], None] = _nobody
        self._detach, self._taking = Happening(), Happening()
        self._taker: Taker | None = None
        self.parked = False
        self.stdin_bytes = 0
        """How many the process was given."""
        self.stdin_is_taken = False
        """Whether its pipe is its client's by now."""
        process.attached.add(self)

    @property
    def detached(self) -> bool:
        """Whether detach() or park() was called."""
        return self._detach.is_set()

    @property
    def fds(self) -> Mapping[str, int]:
        """Ours, by stream."""
        stdin = {STDIN: self._stdin, READER: self._reader}
        return {stream.value: fd for stream, fd in self._outputs.items()} | {
            n: fd for n, fd in stdin.items() if fd >= 0
        }

    @classmethod
    def again(cls, task: Task, process: Process, wanted: Wanted, fds: Mapping[str, int], stdin_bytes: int) -> Self:
        """One that was parked, from what it told."""
        attachment = cls(task, process, wanted)
        attachment._outputs = {stream: fds[stream.value] for stream in Stream if stream.value in fds}
        attachment._stdin, attachment.stdin_bytes = fds.get(STDIN, -1), stdin_bytes
        attachment._reader = fds.get(READER, -1)
        process.on_stdin_close.add(attachment._let_reader_go)
        with suppress(Unavailable):
            attachment._shim, attachment._shim_identity = task.connected(), task.shim_identity
        return attachment

    @classmethod
    async def open(cls, task: Task, process: Process, wanted: Wanted) -> Self:
        """Attach; nothing that the process writes from now on is missed. One that has ended has no output left.

        Raises CorralError.
        """
        attachment = cls(task, process, wanted)
        try:
            await attachment.attach()
        except BaseException:
            attachment.close()
            raise
        return attachment

    def made(self) -> tuple[Shim, Message, list[int]]:
        """What a shim has to be told to attach this client to a process that it is to make: fields, and its ends of
        the pipes, which are the caller's. Raises Unavailable."""
        shim = self._shim = self._task.connected()
        self._shim_identity = self._task.shim_identity
        self._process.on_stdin_close.add(self._let_reader_go)
        fields: Message = {"lossless": self._wanted.lossless, "replay": self._wanted.replay}
        return shim, fields, self._make_pipes(self._process, self._wanted, fields)

    async def attach(self) -> None:
        """As open(), but for who closes it."""
        self._close_pipes()
        self._process.on_stdin_close.add(self._let_reader_go)
        await self._attach(self._wanted)

    async def _attach(self, wanted: Wanted) -> None:
        task, process = self._task, self._process
        while not task.settled.is_set():  # it may be unsettled again by the time that this goes on
            await task.settled.wait()
        if process.ended.is_set() or not (wanted.stdin or wanted.stdout or wanted.stderr):
            return  # there is but the end to be told
        fields: dict[str, object] = {"lossless": wanted.lossless, "replay": wanted.replay}
        theirs = self._make_pipes(process, wanted, fields)
        try:
            shim, self._shim_identity = task.connected(), task.shim_identity
            self._shim = shim
        except Unavailable:
            for fd in theirs:
                os.close(fd)
            self._close_pipes()
            if await process.has_ended(within_s=JUST_ENDED_S):
                return
            raise
        try:
            # From here on the connection owns their ends, whatever happens.
            await shim.attach(process.row.exec_id, fields, theirs)
        except (FailedPrecondition, NotFound, Unavailable) as e:
            if isinstance(e, Unavailable) and not shim.is_open:
                return  # what it has passed on before it was killed is in the pipes; then output() attaches to its heir
            self._close_pipes()
            if not await process.has_ended(within_s=JUST_ENDED_S):
                raise
            # It ended at this moment, and that is no error.

    def _make_pipes(self, process: Process, wanted: Wanted, fields: dict[str, object]) -> list[int]:
        """Make the pipes wanted; returns the shim's ends in the order of the wire."""
        theirs = []
        try:
            if wanted.stdin and process.row.stdin:
                if self._reader < 0:
                    self.close_stdin()
                    self._reader, self._stdin = _pipe()
                theirs.append(os.dup(self._reader))
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
        """Chunks as they come, up to 256 KiB each, until the process has ended and all was read, detach() or take()."""
        while True:
            async with aclosing(self._until_closed()) as output:
                async for chunk in output:
                    yield chunk
            if self._is_interrupted or not await self._attached_again():
                return

    async def _attached_again(self) -> bool:
        """Once the shim has closed every stream: whether another one has taken over, and the process goes on."""
        while (shim := self._shim) is not None and not self._process.ended.is_set() and not self._is_interrupted:
            await first_of(self._process.ended, shim.closed, self._detach, self._taking)
            if not shim.closed.is_set():
                continue
            await self._task.settled.wait()
            if self._process.ended.is_set() or self._is_interrupted:
                break
            # What an heir has read until now, nobody has passed on to this client.
            has_heir = self._task.shim_identity != self._shim_identity
            wanted = replace(self._wanted, replay=has_heir, stdin=max(self._stdin, self._reader) >= 0)
            if not (wanted.stdin or wanted.stdout or wanted.stderr):
                self._shim = None
                break
            self._still.clear()
            self._close_outputs()
            try:
                await self._attach(wanted)
            finally:
                self._still.set()
            self._again.set()
            self._again = Happening()
            return True
        return False

    @property
    def _is_interrupted(self) -> bool:
        return self.detached or self._taking.is_set()

    async def _until_closed(self) -> AsyncGenerator[tuple[Stream, bytes]]:
        while self._outputs and not self._is_interrupted:
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
        """Pass on all of data once there is room; what nobody wants any more is thrown away.

        Raises FailedPrecondition for who has taken the pipe and does not write there.
        """
        if self.stdin_is_taken and data:
            raise FailedPrecondition(
                f"stdin of {self._process.what} is sent through the pipe that was taken, and not by messages any more",
                reason="STDIN_TAKEN",
            )
        view = memoryview(data)
        await self._still.wait()
        while view and self._stdin >= 0:
            try:
                written = os.write(self._stdin, view)
                self.stdin_bytes += written
                view = view[written:]
            except BlockingIOError:
                await self._writable()
            except BrokenPipeError:
                if not await self._has_heir():
                    self.close_stdin()
                await self._still.wait()

    async def _has_heir(self) -> bool:
        """After stdin was refused: whether only the shim is gone, and another one takes more."""
        shim, again = self._shim, self._again
        if shim is None:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(HANG_UP_S):
                await shim.closed.wait()
        if not shim.closed.is_set():
            return False
        await first_of(self._process.ended, again)
        return again.is_set()

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

    def park(self) -> None:
        """Output() ends where it is; what comes waits in the pipes."""
        self.parked = True
        self._detach.set()
        self._wake()

    def unpark(self) -> None:
        """Output() may be asked for the rest."""
        self.parked = False
        self._detach.clear()

    def take(self, taker: Taker) -> None:
        """Output() ends where it is, and hand_over() gives those pipes away."""
        self._taker = taker
        self._taking.set()
        self._wake()

    async def is_wanted(self) -> bool:
        """After output(), which goes on after hand_over(): whether take() was called. Waits for that or for the end."""
        while not (self._process.ended.is_set() or self._is_interrupted):
            await first_of(self._process.ended, self._detach, self._taking)
        return self._taking.is_set()

    def hand_over(self) -> tuple[str, ...] | None:
        """Give pipes to who take() was called for; which they were, or None if that is not reached."""
        self._taking.clear()
        taker = self._taker
        if taker is None or self._process.row.terminal:
            return None
        fds = {name: fd for name, fd in self.fds.items() if name != READER and (name == STDIN) == taker.stdin}
        if not taker.give(tuple(fds.values())):
            return None
        if taker.stdin:
            self.stdin_is_taken = bool(fds)
            self.close_stdin()
        else:
            self._close_outputs()
        return tuple(fds)

    def detach(self) -> None:
        """What was written to stdin still arrives; output() ends."""
        self._detach.set()
        self.close_stdin()
        self._wake()

    def close(self) -> None:
        """Close our ends, and leave; harmless when repeated."""
        self._close_pipes()
        self._process.attached.discard(self)
        self._process.look_unused()

    def _close_pipes(self) -> None:
        self._process.on_stdin_close.discard(self._let_reader_go)
        self._let_reader_go()
        self.close_stdin()
        self._close_outputs()

    def _let_reader_go(self) -> None:
        fd, self._reader = self._reader, -1
        if fd >= 0:
            os.close(fd)

    def _close_outputs(self) -> None:
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
