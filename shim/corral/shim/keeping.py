"""What of a container only its shim has, held a second time by the zygote that made it: so that it outlives the shim.

    shim --frames--> zygote     {"bundle":PATH}                 of one that stood by, before it makes anything
                                {"keep":EXEC,"streams":[NAME...]} + fds     before its program can run
                                {"began":EXEC,"pid":PID,"start_time":TICKS,"started_at_ns":NS}  likewise
                                {"drop":EXEC,"stream":NAME}     the process gets no more of it
                                {"forget":EXEC}                 its end is written down

    zygote, once the shim was killed --<bundle>/keeper--> whoever connects
                                {"exec":EXEC,"streams":[NAME...]} + fds, and of an exec that runs what "began" told

Kept are streams that cannot be opened by a name, a terminal's master or the writing end of a stdin, say, and the FIFOs:
what is in one is gone once nobody has it open, and a zygote that is told of a shim's death is told later than that. Of
each exec it is known which process it is: the zygote inherits and reaps it, and writes down how it ended (orphans.py).
One whose shim was killed before it told it to be its program has ended without having been that; the kernel knows.
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from corral.oci.runtime import ProcessHandle
from corral.shim.errors import ShimError
from corral.shim.fields import integer, strings, text
from corral.shim.loop import IN, Loop
from corral.shim.wire import Channel, Message, ProtocolError, close_all

SOCKET = "keeper"
BACKLOG = 8


class Keeper:
    """The shim's side. A zygote that is gone, or does not read, keeps nothing, and that is no error."""

    __slots__ = ("_channel",)

    def __init__(self, channel: Channel | None = None) -> None:
        """channel: to the zygote, owned from here on; without it nothing is kept."""
        self._channel = channel
        if channel is not None:
            channel.sock.setblocking(False)

    def is_of(self, bundle: Path) -> None:
        """Have it know which bundle is this shim's."""
        self._send({"bundle": str(bundle)})

    def keep(self, exec_id: str, streams: Mapping[str, int]) -> None:
        """Have it hold copies of a process's streams, instead of those that it may have of it."""
        if streams:
            self._send({"keep": exec_id, "streams": list(streams)}, tuple(streams.values()))

    def began(self, exec_id: str, handle: ProcessHandle, at_ns: int) -> None:
        """Have it know which process an exec is, which runs or is about to."""
        who: Message = {"pid": handle.pid, "start_time": handle.start_time}
        self._send({"began": exec_id, **who, "started_at_ns": at_ns})

    def drop(self, exec_id: str, stream: str) -> None:
        """The shim has closed it, and so shall the zygote."""
        self._send({"drop": exec_id, "stream": stream})

    def forget(self, exec_id: str) -> None:
        """Its end is written down."""
        self._send({"forget": exec_id})

    def close(self) -> None:
        """The zygote is told nothing more; harmless when repeated."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(message, fds)
            if self._channel.unsent:  # the fds may be closed before they would be sent
                self.close()
        except EOFError:
            self.close()


@dataclass(frozen=True, slots=True)
class KeptExec:
    """An exec of a shim."""

    exec_id: str
    start_time: int
    started_at_ns: int


@dataclass(slots=True)
class Kept:
    """The zygote's side: what one shim has given it."""

    loop: Loop
    channel: Channel
    bundle: Path | None
    """None while the shim stands by."""
    streams: dict[str, dict[str, int]] = field(default_factory=dict)
    """By exec id and name."""
    execs: dict[int, KeptExec] = field(default_factory=dict)
    """By pid."""
    _open: bool = True

    @property
    def stands_by(self) -> bool:
        """Whether its shim has no bundle yet, and lives."""
        return self.bundle is None and self._open

    def begin(self) -> None:
        """Take what the shim sends, as it comes."""
        self.channel.sock.setblocking(False)
        self.loop.watch(self.channel.sock.fileno(), IN, lambda _events: self._on_ready())

    def drain(self) -> None:
        """Take what the shim has sent until now."""
        while self._receive():
            pass

    def close(self) -> None:
        """Let go of everything; harmless when repeated."""
        self._hang_up()
        for streams in self.streams.values():
            close_all(tuple(streams.values()))
        self.streams.clear()

    def _on_ready(self) -> None:
        self._receive()

    def _receive(self) -> bool:
        """Whether there may be more."""
        if not self._open:
            return False
        try:
            for message in self.channel.receive():
                self._take(message)
        except BlockingIOError:
            return False
        except (EOFError, ProtocolError, ShimError):
            self._hang_up()
            return False
        return True

    def _take(self, message: Message) -> None:
        if "bundle" in message:
            self.bundle = Path(text(message, "bundle"))
        elif "keep" in message:
            exec_id, names = text(message, "keep"), strings(message, "streams")
            self._forget(exec_id)
            self.streams[exec_id] = dict(zip(names, self.channel.take_fds(len(names)), strict=True))
        elif "began" in message:
            exec_id = text(message, "began")
            self._forget_process(exec_id)  # another one may have been tried before
            known = KeptExec(exec_id, integer(message, "start_time"), integer(message, "started_at_ns"))
            self.execs[integer(message, "pid")] = known
        elif "drop" in message:
            fd = self.streams.get(text(message, "drop"), {}).pop(text(message, "stream"), None)
            if fd is not None:
                os.close(fd)
        elif "forget" in message:
            self._forget(text(message, "forget"))

    def _forget(self, exec_id: str) -> None:
        close_all(tuple(self.streams.pop(exec_id, {}).values()))
        self._forget_process(exec_id)

    def _forget_process(self, exec_id: str) -> None:
        for pid in [pid for pid, known in self.execs.items() if exec_id and known.exec_id == exec_id]:
            del self.execs[pid]

    def _hang_up(self) -> None:
        if self._open:
            self._open = False
            self.loop.forget(self.channel.sock.fileno())
            self.channel.close()


class Counter:
    """Where what is kept of one bundle is given away, as copies, to any number who ask."""

    __slots__ = ("_kept", "_listener", "_loop")

    def __init__(self, loop: Loop, bundle: Path, kept: Kept) -> None:
        """Raises OSError, if the bundle is gone say."""
        self._loop, self._kept = loop, kept
        directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SOCKET, dir_fd=directory)
            self._listener.bind(f"/proc/self/fd/{directory}/{SOCKET}")
            self._listener.listen(BACKLOG)
        except BaseException:
            self._listener.close()
            raise
        finally:
            os.close(directory)
        self._listener.setblocking(False)
        loop.watch(self._listener.fileno(), IN, lambda _events: self._serve())

    def close(self) -> None:
        """Nobody is served any more."""
        self._loop.forget(self._listener.fileno())
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            sock, _ = self._listener.accept()
            with contextlib.closing(Channel(sock)) as channel:
                sock.setblocking(False)
                begun = {
                    known.exec_id: {"pid": pid, "start_time": known.start_time, "started_at_ns": known.started_at_ns}
                    for pid, known in self._kept.execs.items()
                }
                for exec_id in self._kept.streams.keys() | begun.keys():
                    streams = self._kept.streams.get(exec_id, {})
                    told: Message = {"exec": exec_id, "streams": list(streams), **begun.get(exec_id, {})}
                    channel.send(told, tuple(streams.values()))
