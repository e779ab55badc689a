"""The shim's side of its socket: connections, the hello, requests in, replies and events out.

client: {"v":1,"client":NAME}           shim: {"v":1,"shim":VERSION,"namespace":…,"container":…,"state":…}
client: {"id":N,"op":OP,…}              shim: {"id":N,"ok":{…}} or {"id":N,"error":{"kind":KIND,"message":SENTENCE}}
client: {"id":N,"op":"exec","start":true,…}   shim: {"id":N,"ok":{"pid":…,"streams":[NAME…]}} + an fd each
client: {"id":N,"op":"run",…}           shim: the same, once the process has ended; it ends with the connection
client: {"id":N,"op":"subscribe"}       shim: {"event":NAME,"exec":ID,…}, from then on
client: {"id":N,"op":"take","bundle":PATH,"namespace":…,"container":…} + its listening socket, of one that stands by
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from corral.kernel import signalfd
from corral.kernel.failpoint import failpoint
from corral.oci.errors import ExecFailed
from corral.oci.larder import Larder
from corral.shim import VERSION, report
from corral.shim.bundle import Bundle
from corral.shim.errors import Kind, ShimError, from_os_error
from corral.shim.fields import flag, integer, text
from corral.shim.keeping import Keeper
from corral.shim.loop import IN, OUT, Loop
from corral.shim.process import State
from corral.shim.processes import STDIN_CLOSED
from corral.shim.requests import Adopt, Attach, Create, Exec, Run, exec_id, size
from corral.shim.shim import STUCK_S, Shim
from corral.shim.wire import Channel, Message, ProtocolError

PROTOCOL = 1
ABANDONED_S = 10.0
ACCEPT_PAUSE_S = 0.5
MAX_CONNECTIONS = 256
_EXEC_FAILED: dict[str, Kind] = {"exec_not_found": "exec_not_found", "exec_denied": "exec_denied"}
BEFORE_BUNDLE = frozenset(("subscribe", "take"))
# Whatever is sent to the shim itself must not end it: it is not the container.
SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Connection:
    """One client. `handler` gets each message; the hello comes first."""

    __slots__ = ("channel", "closed", "greeted", "keeps", "runs", "subscribed", "writing")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.runs: set[str] = set()
        self.closed = self.greeted = self.keeps = self.subscribed = self.writing = False


class Server:
    """Serves one container until it has ended and everyone was told."""

    def __init__(
        self,
        loop: Loop,
        *,
        larder: Larder | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        """As for Shim; its container is yet to be told, to be_of()."""
        self._loop = loop
        self.bundle = Bundle()
        self._directory = self.bundle.directory
        self._listener: socket.socket | None = None
        self._orders: Channel | None = None
        self._namespace = self._container = ""
        self.shim = Shim(
            self._loop, self.bundle, publish=self._publish, on_end=self._shim_ended, larder=larder, keeper=keeper
        )
        self._connections: dict[int, Connection] = {}
        self._waiting_for_end: list[tuple[Connection, object]] = []
        self._signals = -1
        self._end_by = 0.0
        shim = self.shim
        self._ops: dict[str, Callable[[Connection, Message], Message | None]] = {
            "create": self._create,
            "start": lambda _, m: shim.start(exec_id(m)),
            "exec": self._exec,
            "run": self._run,
            "attach": lambda c, m: shim.attach(Attach.parse(m), c.channel.take_fds),
            "close_stdin": lambda _, m: shim.close_stdin(exec_id(m)),
            "resize": lambda _, m: shim.resize(exec_id(m), *size(integer(m, "width"), integer(m, "height"), "size")),
            "kill": lambda _, m: shim.kill(exec_id(m), integer(m, "signal"), everyone=flag(m, "all")),
            "state": lambda _c, _m: shim.describe(),
            "subscribe": lambda c, _: self._subscribe(c),
            "reopen_log": lambda _c, _m: shim.reopen_log(),
            "delete": self._delete,
            "delete_exec": lambda _, m: shim.execs.delete(exec_id(m)),
            "adopt": lambda c, m: shim.adopt(Adopt.parse(m), c.channel.take_fds),
            "streams": self._streams,
            "take": self._take,
        }

    def begin(self, orders: Channel | None = None) -> None:
        """Serve from here on, in the loop, which is stopped in the end. orders: from the zygote, who tells which bundle
        is this shim's, or who will tell that."""
        self._signals = signalfd.open_signalfd(SIGNALS)
        self._loop.watch(self._signals, IN, lambda _events: self._on_signal())
        self._orders = orders
        if orders is not None:
            orders.sock.setblocking(False)
            self._loop.watch(orders.sock.fileno(), IN, lambda _events: self._on_order(orders))

    def _on_order(self, orders: Channel) -> None:
        try:
            for message in orders.receive():
                sock = _unix_socket(orders)
                if "stand_by" in message:
                    self._serve(sock)
                    self.shim.stand_by()
                else:
                    self.be_of(message, sock)
        except BlockingIOError:
            pass
        except EOFError:  # the zygote has ended
            self._loop.stop()

    def be_of(self, order: Message, listener: socket.socket) -> None:
        """Be the shim of the bundle that an order tells. listener, owned from here on, is bound and listening already,
        so a client can never come too early. Raises OSError, ShimError; then nothing has changed."""
        try:
            namespace, container = text(order, "namespace"), text(order, "container")
            self.bundle.become(Path(text(order, "bundle")))
        except BaseException:
            listener.close()
            raise
        self._listener, self._namespace, self._container = listener, namespace, container
        if self._orders is not None:
            self._loop.forget(self._orders.sock.fileno())
        failpoint("shim.spawned")
        listener.setblocking(False)
        self._watch(listener)
        self._loop.on_error = self._report
        self._loop.call_later(ABANDONED_S, self._end_if_abandoned)

    def _watch(self, listener: socket.socket) -> None:
        self._loop.watch(listener.fileno(), IN, lambda _events: self._accept(listener))

    def close(self) -> None:
        """Hang up on everybody and release all descriptors; only for a process that goes on without this shim."""
        for connection in tuple(self._connections.values()):
            self._close(connection)
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
        self._loop.forget(self._signals)
        os.close(self._signals)
        self.shim.close()
        self.bundle.close()

    # Connections.

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as e:
            # Most likely too many descriptors are open, which would be so again at once.
            report.write(self._directory, f"accept: {e}")
            self._loop.forget(listener.fileno())
            self._loop.call_later(ACCEPT_PAUSE_S, lambda: self._watch(listener))
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        connection = Connection(Channel(sock))
        self._connections[sock.fileno()] = connection
        self._loop.watch(sock.fileno(), IN, lambda events: self._on_ready(connection, events))

    def _on_ready(self, connection: Connection, events: int) -> None:
        try:
            if events & OUT:
                self._flush(connection)
            if events & ~OUT:
                for message in connection.channel.receive():
                    self._on_message(connection, message)
                    if connection.closed:
                        return
        except BlockingIOError:
            pass
        except EOFError:
            self._close(connection)
        except ProtocolError as e:
            self._refuse(connection, e)

    def _on_message(self, connection: Connection, message: Message) -> None:
        if not connection.greeted:
            if not isinstance(message.get("v"), int):
                raise ProtocolError("the first frame must be a hello with a version")
            connection.greeted = True
            self._send(connection, self._hello())
            return
        number = message.get("id")
        try:
            result = self._handle(connection, message)
        except ProtocolError as e:
            self._reply_error(connection, number, ShimError("invalid_argument", str(e)))
        except ShimError as e:
            self._reply_error(connection, number, e)
        else:
            if result is not None:
                self._send(connection, {"id": number, "ok": result})

    def _handle(self, connection: Connection, message: Message) -> Message | None:
        """Do what a request asks. Every failure leaves as a ShimError, or ProtocolError for missing descriptors."""
        name = message.get("op")
        op = self._ops.get(name) if isinstance(name, str) else None
        if self.bundle.path is None and name not in BEFORE_BUNDLE:
            raise ShimError("failed_precondition", f"this shim has no container yet, and can't {name!r}")
        if op is None:
            raise ShimError("unimplemented", f"this shim (version {VERSION}) has no operation {name!r}")
        try:
            return op(connection, message)
        except (ShimError, ProtocolError):
            raise
        except ExecFailed as e:
            raise ShimError(_EXEC_FAILED.get(e.kind, "failed_precondition"), e.message) from e
        except OSError as e:
            raise from_os_error(e) from e
        except ValueError as e:
            raise ShimError("invalid_argument", str(e)) from e
        except Exception as e:
            report.write(self._directory, f"{name}: {report.describe(e)}")
            raise ShimError("internal", f"{name}: {type(e).__name__}: {e}") from e

    def _hello(self) -> Message:
        return {
            "v": PROTOCOL,
            "shim": VERSION,
            "namespace": self._namespace,
            "container": self._container,
            "state": self.shim.state.value,
        }

    def _reply_error(self, connection: Connection, number: object, error: ShimError) -> None:
        self._send(connection, {"id": number, "error": {"kind": error.kind, "message": str(error)}})

    def _refuse(self, connection: Connection, error: ProtocolError) -> None:
        """The stream is of no further use: say why and hang up."""
        self._reply_error(connection, None, ShimError("invalid_argument", str(error)))
        self._close(connection)

    def _send(self, connection: Connection, message: Message, fds: Sequence[int] = ()) -> None:
        if connection.closed:
            return
        try:
            connection.channel.send(message, fds)
            self._flush(connection)
        except EOFError:
            self._close(connection)

    def _flush(self, connection: Connection) -> None:
        writing = not connection.channel.flush()
        if writing != connection.writing:
            connection.writing = writing
            events = IN | OUT if writing else IN
            self._loop.watch(connection.channel.sock.fileno(), events, lambda e: self._on_ready(connection, e))

    def _close(self, connection: Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        fd = connection.channel.sock.fileno()
        self._loop.forget(fd)
        del self._connections[fd]
        connection.channel.close()
        for run in connection.runs:
            self.shim.execs.end_run(run)
        if self.bundle.path is None:  # who would have told it
            self._loop.stop()

    def _create(self, _connection: Connection, message: Message) -> Message:
        self.shim.expect(message)
        return self.shim.create(Create.parse(message))

    def _take(self, connection: Connection, message: Message) -> Message:
        sock = _unix_socket(connection.channel)
        if self.bundle.path is not None:
            sock.close()
            raise ShimError("failed_precondition", "this shim has its container")
        self.be_of(message, sock)
        self.shim.keeper.is_of(self.bundle.known())
        return {}

    # Events and the end.

    def _subscribe(self, connection: Connection) -> Message:
        connection.subscribed = True
        return {}

    def _streams(self, connection: Connection, message: Message) -> None:
        self._send_streams(connection, message.get("id"), exec_id(message), {})

    def _send_streams(self, connection: Connection, number: object, name: str, reply: Message) -> None:
        """Copies of a process's streams, for the shim after this one; who does not read its replies gets no list at
        all: one without a stdin says that it was closed.

        From then on the client is told when it has to close that of a stdin, too.
        """
        connection.keeps = True
        if connection.channel.unsent:
            self._send(connection, {"id": number, "ok": reply})
            return
        streams = self.shim.processes.streams(name)
        self._send(connection, {"id": number, "ok": {**reply, "streams": list(streams)}}, list(streams.values()))

    def _exec(self, connection: Connection, message: Message) -> Message | None:
        """One that is started at once is told with its streams."""
        request = Exec.parse(message)
        reply = self.shim.execs.add(request, connection.channel.take_fds)
        if not request.start:
            return reply
        self._send_streams(connection, message.get("id"), request.exec_id, reply)
        return None

    def _run(self, connection: Connection, message: Message) -> None:
        """What is run is only this client's, and answered once it has ended."""
        number, request = message.get("id"), Run.parse(message)

        def ended(how: Message) -> None:
            connection.runs.discard(request.exec_id)
            self._send(connection, {"id": number, "ok": how})

        self.shim.execs.run(request, ended)
        connection.runs.add(request.exec_id)

    def _publish(self, event: Message) -> None:
        keepers_only = event["event"] == STDIN_CLOSED
        for connection in tuple(self._connections.values()):
            if connection.keeps if keepers_only else connection.subscribed:
                self._send(connection, event)

    def _on_signal(self) -> None:
        if signal.SIGCHLD in signalfd.read_signals(self._signals):
            try:
                self.shim.processes.reap()
            except Exception as e:  # noqa: BLE001 - the next child must be reaped all the same
                self._report(e)

    def _report(self, error: Exception) -> None:
        """A bug; the container goes on."""
        report.write(self._directory, report.describe(error))

    def _delete(self, connection: Connection, message: Message) -> Message | None:
        failpoint("shim.delete")
        if self.shim.delete():
            self._shim_ended()
            return {}
        self._waiting_for_end.append((connection, message.get("id")))
        return None

    def _shim_ended(self) -> None:
        for connection, number in self._waiting_for_end:
            self._send(connection, {"id": number, "ok": {}})
        self._end_by = time.monotonic() + STUCK_S
        self._loop.call_later(0, self._end_when_told)

    def _end_when_told(self) -> None:
        """Everybody who reads gets what was sent to them; who does not read is not waited for long."""
        if any(c.channel.unsent for c in self._connections.values()) and time.monotonic() < self._end_by:
            self._loop.call_later(0.01, self._end_when_told)
        else:
            # Hung up at once: whoever waits for that does not wait for the kernel to take this process apart.
            for connection in tuple(self._connections.values()):
                self._close(connection)
            self._loop.stop()

    def _end_if_abandoned(self) -> None:
        """Whoever asked for this shim died before using it, or has given up waiting for it."""
        if self.shim.state is not State.NEW:
            return
        if self._connections:
            self._loop.call_later(ABANDONED_S, self._end_if_abandoned)
        else:
            self._loop.stop()


def _unix_socket(channel: Channel) -> socket.socket:
    """The one that came with the current message."""
    (fd,) = channel.take_fds(1)
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
