"""One shim, as the daemon sees it: a typed front of the wire's operations.

The connection says hello and subscribes as soon as it is made, without waiting for the answers; a shim that was only
just forked, or is not even forked yet, finds all of it in its socket.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from corral.rpc.errors import Unavailable
from corral.shim.wire import Message
from corral.tasks.connection import Connection, ConnectionLostError
from corral.tasks.happening import Happening
from corral.tasks.identity import Identity
from corral.tasks.model import INIT, Exit, mapping, optional_int

VERSION = 1
_USUAL = -1.0

type ProcessState = Literal["created", "running", "stopped"]


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """What a shim says of one process."""

    state: str
    identity: Identity | None
    exit: Exit | None


@dataclass(frozen=True, slots=True)
class StateReport:
    """What a shim says of its container; `init` is None before create."""

    shim_pid: int
    processes: Mapping[str, ProcessReport]

    @property
    def init(self) -> ProcessReport | None:
        return self.processes.get(INIT)


@dataclass(frozen=True, slots=True)
class Begun:
    """An exec that runs, if it has an identity, with copies of its streams, which are the caller's, if any are told."""

    identity: Identity | None
    streams: dict[str, int] | None


@dataclass(frozen=True, slots=True)
class Ran:
    """A process that has ended, and what it wrote first."""

    identity: Identity | None
    exit: Exit
    output: str


def _ignore(_what: object = None) -> None:
    """Nobody asked."""


class Shim:
    """A connection to one shim.

    Every method raises CorralError if the shim refuses, Unavailable if it is gone or stuck.
    """

    def __init__(self, sock: socket.socket, *, timeout_s: float) -> None:
        """`sock` is a connection to it; taken over."""
        self._timeout_s = timeout_s
        self._early: list[Message] = []
        self._on_exit: Callable[[str, Exit], None] | None = None
        self._on_oom: Callable[[int], None] = _ignore
        self._on_stdin_close: Callable[[str], None] = _ignore
        self._on_close: Callable[[], None] | None = None
        self.closed = Happening()
        self.runs = True
        """Whether it can run() a process, as far as is known."""
        self._connection = Connection(sock, on_event=self._event, on_close=self._closed)
        self._connection.send({"v": VERSION, "client": "tasks"})
        self._connection.request("subscribe", {})

    def follow(
        self,
        on_exit: Callable[[str, Exit], None],
        on_close: Callable[[], None],
        on_oom: Callable[[int], None] = _ignore,
        on_stdin_close: Callable[[str], None] = _ignore,
    ) -> None:
        """From now on on_exit gets the exec id and the end of each process, on_oom the number of processes killed for
        memory so far, on_stdin_close the exec id of each that is to get no more input, all of them first what was
        reported already; on_close is called when the shim has gone away."""
        self._on_exit, self._on_oom, self._on_close = on_exit, on_oom, on_close
        self._on_stdin_close = on_stdin_close
        early, self._early = self._early, []
        for message in early:
            self._event(message)
        if not self.is_open:
            on_close()

    @property
    def is_open(self) -> bool:
        return self._connection.is_open

    def close(self) -> None:
        """Hang up; the shim goes on. on_close is not called."""
        self._connection.close()

    def take(self, order: Message, listener: socket.socket) -> asyncio.Future[Message]:
        """Have one that stands by be the shim of a bundle, whose listening socket stays the caller's. Its answer, which
        may be awaited or looked at later, says that it may have made something; it raises ConnectionLostError."""
        return self._connection.request("take", order, [os.dup(listener.fileno())])

    async def create(self, fields: Message) -> Identity:
        """Make the container; returns its init, which waits for start."""
        return _identity(await self._ask("create", fields)) or _missing("create")

    async def adopt(self, exec_id: str, fields: Message, fds: Sequence[int]) -> None:
        """Take over a process of a shim that was killed, with its streams, which are taken over in any case."""
        await self._ask("adopt", {"exec": exec_id, **fields}, fds)

    def streams(self, exec_id: str, then: Callable[[dict[str, int]], None]) -> None:
        """Ask for copies of a process's streams; `then` owns them. It is not called if none are told."""
        reply = self._connection.request("streams", {"exec": exec_id})

        def came(reply: asyncio.Future[Message]) -> None:
            if not reply.cancelled() and reply.exception() is None:
                streams = reply.result().get("streams")
                if isinstance(streams, dict):
                    then(streams)

        reply.add_done_callback(came)

    async def start(self, exec_id: str, *, on_sent: Callable[[], None] = _ignore) -> Identity | None:
        """Let a process run. An exec begins to exist now and its identity is returned.

        on_sent is called once the shim may know of it.
        """
        return _identity(await self._ask("start", {"exec": exec_id}, on_sent=on_sent))

    async def exec(self, exec_id: str, fields: Message, fds: Sequence[int] = ()) -> Begun:
        """Register an exec; with "start" in the fields it runs by then, with the client attached that "attach" and the
        fds are for, which are taken over in any case. An older shim ignores both."""
        reply = await self._ask("exec", {"exec": exec_id, **fields}, fds)
        streams = reply.get("streams")
        return Begun(_identity(reply), streams if isinstance(streams, dict) else None)

    async def run(self, exec_id: str, fields: Message, *, timeout_ns: int, output_bytes: int) -> Ran:
        """Run a process to its end, which it reaches with the connection at the latest. Raises Unimplemented if it is
        too old a shim."""
        asked = {"exec": exec_id, "timeout_ns": timeout_ns, "output_bytes": output_bytes, **fields}
        patience_s = self._timeout_s + timeout_ns / 1e9 if timeout_ns else None
        reply = await self._ask("run", asked, timeout_s=patience_s)
        return Ran(_identity(reply), Exit.from_shim(reply), str(reply.get("output") or ""))

    async def attach(self, exec_id: str, fields: Message, fds: Sequence[int]) -> None:
        """Hand over one end of each stream, in the order stdin, stdout, stderr; they are taken over in any case."""
        await self._ask("attach", {"exec": exec_id, **fields}, fds)

    async def kill(self, exec_id: str, signal: int, *, everything: bool) -> None:
        """Signal a process, or every process of the container."""
        await self._ask("kill", {"exec": exec_id, "signal": signal, "all": everything})

    async def reopen_log(self) -> None:
        """Open the log again by its name."""
        await self._ask("reopen_log", {})

    async def resize(self, exec_id: str, width: int, height: int) -> None:
        """Tell a terminal its size."""
        await self._ask("resize", {"exec": exec_id, "width": width, "height": height})

    async def close_stdin(self, exec_id: str) -> None:
        """Let a process read the end of its stdin."""
        await self._ask("close_stdin", {"exec": exec_id})

    async def delete_exec(self, exec_id: str) -> None:
        """Let the shim forget an exec."""
        await self._ask("delete_exec", {"exec": exec_id})

    async def delete(self) -> None:
        """Kill what is left; the shim ends."""
        await self._ask("delete", {})

    async def state(self) -> StateReport:
        """What the shim knows of its processes."""
        reply = await self._ask("state", {})
        processes = {exec_id: _report(mapping(mapping(reply, "execs"), exec_id)) for exec_id in mapping(reply, "execs")}
        init = _report(reply)
        if init.state != "new":
            processes[INIT] = init
        return StateReport(optional_int(reply, "shim_pid") or 0, processes)

    async def _ask(
        self,
        op: str,
        fields: Message,
        fds: Sequence[int] = (),
        *,
        on_sent: Callable[[], None] = _ignore,
        timeout_s: float | None = _USUAL,
    ) -> Message:
        timeout_s = self._timeout_s if timeout_s is _USUAL else timeout_s
        reply = self._connection.request(op, fields, fds)
        if self.is_open:  # else sending it has failed
            on_sent()
        expiry = None if timeout_s is None else reply.get_loop().call_later(timeout_s, _expire, reply)
        try:
            return await reply
        except ConnectionLostError as e:
            raise Unavailable(f"the shim went away during {op!r}: {e}", reason="SHIM_GONE") from e
        except TimeoutError as e:
            raise Unavailable(f"the shim did not answer {op!r} within {timeout_s:g} s", reason="SHIM_STUCK") from e
        finally:
            if expiry is not None:
                expiry.cancel()

    def _event(self, message: Message) -> None:
        if self._on_exit is None:
            self._early.append(message)
            return
        match message.get("event"):
            case "exited":
                self._on_exit(str(message.get("exec") or INIT), Exit.from_shim(message))
            case "stdin_closed":
                self._on_stdin_close(str(message.get("exec") or INIT))
            case "oom":
                self._on_oom(optional_int(message, "oom_kills") or 1)

    def _closed(self) -> None:
        self.closed.set()
        if self._on_close is not None:
            self._on_close()


def _expire(reply: asyncio.Future[Message]) -> None:
    if not reply.done():
        reply.set_exception(TimeoutError())


def _identity(message: Mapping[str, object]) -> Identity | None:
    pid, start_time = optional_int(message, "pid"), optional_int(message, "start_time")
    return Identity(pid, start_time) if pid and start_time else None


def _missing(op: str) -> Identity:
    raise Unavailable(f"the shim's answer to {op!r} names no process", reason="SHIM_ANSWER")


def _report(message: Mapping[str, object]) -> ProcessReport:
    record = mapping(message, "exit")
    return ProcessReport(
        state=str(message.get("state")),
        identity=_identity(message),
        exit=Exit.from_shim(record) if record else None,
    )
