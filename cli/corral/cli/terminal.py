"""A terminal, or pipes, joined to a process in a container.

    stdin, signals --(pump thread)--> outbox --> request stream --> process
    stdout, stderr <---------------- main thread <--------------- answers

The pump sleeps in select on stdin and on a wake-up pipe that signal handlers write to, so that no RPC is ever made
inside a signal handler.

Once much has come or gone that way, and there is no terminal, a daemon on this host is asked for the process's pipes
themselves (corral.cli.pipes): for those of its output first, whose coming may have to wait until somebody reads ours;
then, as that has come, for stdin's, which the pump waits for. So input never waits for output.

So is it after a second, however little has come: from then on a daemon that is killed, and comes back, is not missed.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2
from corral.cli.detach_keys import DetachKeys
from corral.cli.outbox import Outbox
from corral.client.execution import Attachment
from corral.client.sync import Client
from corral.client.transport import Exchange
from corral.rpc.attempts import Attempts
from corral.rpc.errors import PAUSES_S, UNSERVED, CorralError, NotFound, Unavailable

if TYPE_CHECKING:
    from corral.cli.pipes import Input, Output, Taker

_CHUNK = 256 * 1024
_TAKE_AFTER = 1 << 20
_TAKE_AFTER_S = 1.0
# What the pump is woken with, besides the numbers of signals.
_END, _ASK, _ASK_FOR_STDIN, _GO_ON = b"\0", b"\xff", b"\xfe", b"\xfd"
# After so many SIGINT or SIGTERM the session ends, whatever the container does; docker's number.
_PATIENCE = 3
_ASKS_TO_END = {signal.SIGINT, signal.SIGTERM}
# Signals that are about this process, not about the container.
_OWN_SIGNALS = {signal.SIGCHLD, signal.SIGPIPE, signal.SIGURG, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT}
_OWN_SIGNALS |= {
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
}
# Reasons why a call ends that concern corrald, and not the process; none: gRPC says so itself.
_GONE = {"", UNSERVED, "UNREACHABLE", "CUT_OFF", "STOPPING"}


def window_size() -> tuple[int, int] | None:
    """Columns and rows of this terminal; None without one."""
    for fd in (0, 1, 2):
        try:
            size = os.get_terminal_size(fd)
        except OSError:
            continue
        return size.columns, size.lines
    return None


class Session:
    """One attached process, until it ends or the user detaches."""

    def __init__(
        self,
        client: Client,
        attachment: Attachment,
        *,
        terminal: bool,
        detach_keys: bytes = b"",
        signal_proxy: bool = True,
    ) -> None:
        self.client = client
        self.attachment = attachment
        self.terminal = terminal
        self.detach_keys = detach_keys
        self.signal_proxy = signal_proxy
        self._answers: Exchange[tasks_pb2.AttachResponse] | None = None
        self._outbox = Outbox()
        self._wake = (-1, -1)
        self._takes_pipes = not terminal and client.address.startswith("unix:")
        self._taker: Taker | None = None
        self._waits_for_stdin = False
        self._asking = threading.Lock()  # of those two
        self._moved_bytes = 0
        self._ask_at: float | None = None
        # Whether no byte goes by the daemon any more, either way.
        self._has_outputs = False
        self._has_stdin = not attachment.stdin
        self._outputs: dict[int, Output] = {}
        self._input: Input | None = None
        self._asked_to_end = 0
        self._passed_on: set[signal.Signals] = set()
        self._unsent: set[int] = set()  # those that wait for the daemon, like pending ones of the kernel's
        self._leaves = False
        self._passing_on = threading.Lock()  # of those two

    def run(self, on_attached: Callable[[], object] = lambda: None) -> types_pb2.ExitStatus | None:
        """Joins the streams; calls `on_attached` when no output can be missed any more.

        Returns how the process ended, or None after a detach. Raises KeyboardInterrupt when asked often to end.
        """
        self._wake, self._began_ns = os.pipe(), time.time_ns()
        self._ask_at = time.monotonic() + _TAKE_AFTER_S
        for fd in self._wake:
            os.set_blocking(fd, False)
        with contextlib.ExitStack() as stack:
            for fd in self._wake:
                stack.callback(os.close, fd)
            stack.enter_context(self._signals())
            if self.terminal and self.attachment.stdin:
                stack.enter_context(raw_terminal())
            pump = threading.Thread(target=self._pump, name="stdin", daemon=True)
            pump.start()
            stack.callback(self._stop_pump, pump)
            try:
                return self._receive(on_attached)
            finally:
                for output in self._outputs.values():
                    if output.failure is not None:
                        raise output.failure

    def _receive(self, on_attached: Callable[[], object]) -> types_pb2.ExitStatus | None:
        attachment, begun = self.attachment._replace(resumable=True), False
        attempts, stdin_bytes = Attempts(), 0
        try:
            while True:
                self._answers = self.client.containers.attach(attachment, self._outbox.requests())
                if self._has_failed():
                    return None  # it may have ended the call before this one
                parked, attached = None, False
                try:
                    for part in self._answers:
                        match part.WhichOneof("part"):
                            case "attached":
                                attached = True
                                if not begun:
                                    begun = True
                                    on_attached()
                                attempts = Attempts()
                                self._send_again()
                            case "stdout":
                                self._write(1, part.stdout)
                            case "stderr":
                                self._write(2, part.stderr)
                            case "pipes":
                                self._take(part.pipes)
                            case "parked":
                                parked = part.parked
                            case "exited":
                                return self._ended(part.exited)
                except Unavailable as e:
                    # Either nobody has served this call, or it was parked.
                    lost = attached and parked is None
                    if lost or (pause_s := attempts.pause_if_unserved_s(e)) is None:
                        if not begun or e.reason not in _GONE:
                            raise
                        if self._has_outputs and self._has_stdin:
                            return self._await_end(e)
                        raise self._cut_off() from e
                else:
                    return None
                if parked is not None:
                    attachment, stdin_bytes = attachment._replace(resume=parked.token), parked.stdin_bytes
                self._outbox.rewind(stdin_bytes)
                self._stop_asking()
                time.sleep(pause_s)
        finally:
            self._outbox.end()
            if self._answers is not None:
                self._answers.cancel()

    def _await_end(self, lost: Unavailable) -> types_pb2.ExitStatus | None:
        """The pipes go on without a daemon; one that comes back is asked for the end, and told of signals that came.

        It is waited for as long as more output may come, and then for half a minute; but once a SIGINT or SIGTERM could
        not be passed on, a second one ends the session. Raises Unavailable.
        """
        from corral.cli.lost_end import LostEnd

        end, pauses = LostEnd(self.client, self.attachment, self._began_ns), iter(PAUSES_S)
        goes_on = self._has_live_outputs()

        def on_reached() -> None:
            nonlocal pauses
            pauses = iter(PAUSES_S)
            self._send_again()

        while not self._has_failed():
            try:
                if (status := end.ask(self._set_call, on_reached)) is not None:
                    return self._ended(status)
            except NotFound as e:
                raise Unavailable("corral went away, and how this ended it does not know", reason="CUT_OFF") from e
            except Unavailable as e:
                if e.reason not in _GONE:
                    raise
            if self._leaves:
                raise self._cut_off() from lost
            if goes_on and not (goes_on := self._has_live_outputs()):
                pauses = iter(PAUSES_S)
            if (pause_s := next(pauses, PAUSES_S[-1] if goes_on else None)) is None:
                gone = "corral went away and did not come back: all that was said is here, but not how it ended"
                raise Unavailable(gone, reason="CUT_OFF") from lost
            time.sleep(pause_s)
        return None

    def _set_call(self, answers: Exchange[tasks_pb2.AttachResponse]) -> None:
        self._answers = answers
        if self._has_failed():
            answers.cancel()

    def _has_live_outputs(self) -> bool:
        return any(output.is_alive() for output in self._outputs.values())

    def _has_failed(self) -> bool:
        return any(output.failure is not None for output in self._outputs.values())

    def _ended(self, status: types_pb2.ExitStatus) -> types_pb2.ExitStatus:
        """How it ended, once all that it said has gone where it belongs."""
        for output in self._outputs.values():
            output.join()
        return status

    def _cut_off(self) -> Unavailable:
        container = self.attachment.container
        goes_on = (
            f"the command goes on in container {container}, and what it says from now on is lost"
            if self.attachment.exec_id
            else f"the container goes on, and corral attach {container} shows it again"
        )
        return Unavailable(f"corral went away from this terminal; {goes_on}", reason="CUT_OFF")

    def _send_again(self) -> None:
        """The daemon is back: the pump passes on what it could not."""
        with self._passing_on:
            os.write(self._wake[1], bytes(self._unsent))
            self._unsent.clear()
            self._leaves = False

    def _write(self, fd: int, data: bytes) -> None:
        self._end_of_output(fd)
        if self._has_outputs:  # it has got a new shim, and more comes this way
            self._has_outputs = False
            self._ask_later()
        write_all(fd, data)
        self._count(len(data))

    def _end_of_output(self, target: int) -> None:
        """Where the process has got a new shim: first comes all that the one before has sent."""
        if target in self._outputs:
            self._outputs[target].join()

    def _take(self, pipes: tasks_pb2.Pipes) -> None:
        """The daemon has sent them, if it has reached us."""
        if (taker := self._taker) is None:  # they were asked for in a call before this one
            return
        from corral.cli.pipes import Input, Output

        self._takes_pipes = pipes.reached
        for name, fd in taker.receive(pipes.streams).items() if pipes.reached else ():
            if name == "stdin":
                self._input = Input(fd)
            else:
                target = {"stdout": 1, "stderr": 2}[name]
                self._end_of_output(target)
                self._outputs[target] = Output(fd, target, self._give_up)
                self._outputs[target].start()
        if pipes.reached and self._waits_for_stdin:
            self._has_stdin = True  # or it has ended, and the daemon has heard of that
        elif pipes.reached:
            self._has_outputs = True
        self._stop_asking()
        if pipes.reached and not self._has_stdin:
            os.write(self._wake[1], _ASK_FOR_STDIN)

    def _stop_asking(self) -> None:
        with self._asking:
            if self._taker is not None:
                self._taker.close()
                self._taker, self._moved_bytes, self._waits_for_stdin = None, 0, False
                if not self._has_outputs:
                    self._ask_at = time.monotonic() + _TAKE_AFTER_S
                os.write(self._wake[1], _GO_ON)

    def _ask_later(self) -> None:
        with self._asking:
            self._ask_at = time.monotonic() + _TAKE_AFTER_S
            os.write(self._wake[1], _GO_ON)

    def _give_up(self) -> None:
        if self._answers is not None:
            self._answers.cancel()

    def _count(self, moved_bytes: int) -> None:
        """Of what came or went by messages."""
        if self._takes_pipes:
            before, self._moved_bytes = self._moved_bytes, self._moved_bytes + moved_bytes
            if before < _TAKE_AFTER <= self._moved_bytes:
                os.write(self._wake[1], _ASK)

    # ------------------------------------------------------------ pump thread

    def _pump(self) -> None:
        keys, more = DetachKeys(self.detach_keys if self.terminal else b""), self.attachment.stdin
        if self.terminal:
            self._send_size()
        while True:
            waits = self._waits_for_stdin  # looked at first: once it waits no more, the pipe is there
            pipe = self._input
            is_full = pipe is not None and pipe.is_full
            reads = [self._wake[0], *([0] if more and not is_full and not waits else [])]
            writes = [pipe.fd] if pipe is not None and is_full and more else []
            ready, writable, _ = select.select(reads, writes, [], self._asks_in_s())
            if not ready and not writable:
                self._ask(stdin=False)
            elif self._wake[0] in ready:
                if not self._on_wake():
                    return
            elif pipe is not None and writable:
                more = pipe.go_on()
            elif pipe is not None and 0 in ready:
                more = pipe.move()
            elif 0 in ready:
                more = self._on_stdin(keys)

    def _on_stdin(self, keys: DetachKeys) -> bool:
        """Passes on what was typed; False when no more comes."""
        try:
            data = os.read(0, _CHUNK)
        except OSError:
            data = b""
        if not data and self.terminal:
            # A raw terminal only ends when it hangs up; the container goes on, as after a detach.
            self._detach()
            return False
        if not data:
            # Not the end of all requests: there may be pipes to be asked for.
            self._outbox.put(tasks_pb2.AttachRequest(end_of_stdin=tasks_pb2.EndOfStdin()))
            return False
        passed, detach = keys.feed(data)
        if passed:
            self._outbox.put(tasks_pb2.AttachRequest(stdin=passed))
            self._count(len(passed))
        if detach:
            self._detach()
        return not detach

    def _asks_in_s(self) -> float | None:
        at = self._ask_at if self._takes_pipes else None
        return None if at is None else max(0.0, at - time.monotonic())

    def _on_wake(self) -> bool:
        """Acts on the signals that came; False when it is time to end."""
        for number in os.read(self._wake[0], 64):
            if number == _END[0]:
                return False
            if number == _ASK[0]:
                self._ask(stdin=False)
            if number == _ASK_FOR_STDIN[0]:
                self._ask(stdin=True)
            if number == signal.SIGWINCH:
                self._send_size()
            elif number == signal.SIGHUP and self.terminal:
                self._detach()
                return False
            elif number in self._passed_on:  # whatever has a handler of Python's wakes us, SIGINT for one
                self._pass_on(number)
        return True

    def _pass_on(self, number: int) -> None:
        """Or keeps it until the daemon is back."""
        with self._passing_on:
            try:
                self.client.containers.kill(self.attachment.container, str(number))
            except Unavailable as e:
                if e.reason in _GONE:
                    self._leaves |= number in _ASKS_TO_END and not self._unsent.isdisjoint(_ASKS_TO_END)
                    self._unsent.add(number)
            except CorralError:
                pass  # it may just have ended

    def _ask(self, *, stdin: bool) -> None:
        from corral.cli.pipes import Taker

        with self._asking:
            self._ask_at = None
            if self._taker is not None:
                return
            try:
                self._taker = Taker()
            except OSError:
                self._takes_pipes = False
                return
            self._waits_for_stdin = stdin
            self._outbox.put(self._taker.request(stdin=stdin))

    def _detach(self) -> None:
        """What was typed before still arrives; then the call ends without an exit status."""
        self._outbox.put(tasks_pb2.AttachRequest(detach=tasks_pb2.Detach()))
        self._outbox.end()

    def _send_size(self) -> None:
        if size := window_size():
            resize = types_pb2.WindowSize(width=size[0], height=size[1])
            self._outbox.put(tasks_pb2.AttachRequest(resize=resize))

    def _stop_pump(self, pump: threading.Thread) -> None:
        os.write(self._wake[1], _END)
        self._outbox.end()
        pump.join(timeout=1)

    # ------------------------------------------------------------ signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        wanted = {signal.SIGWINCH} if self.terminal else set()
        if self.signal_proxy and not self.attachment.exec_id:
            self._passed_on = {s for s in signal.valid_signals() if s not in _OWN_SIGNALS}
            wanted |= self._passed_on
        before = {}
        for number in wanted:
            with contextlib.suppress(OSError, ValueError):
                before[number] = signal.signal(number, self._on_signal)
        previous_wakeup = signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        """The pump passes it on. A program that does not end, or a daemon that hangs, must not hold the terminal."""
        if number in _ASKS_TO_END:
            self._asked_to_end += 1
            if self._asked_to_end == _PATIENCE:
                sys.stderr.write(f"corral: asked {_PATIENCE} times to end: the container is left as it is\n")
                raise KeyboardInterrupt


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Keys reach the container as they are typed; the terminal is restored whatever happens."""
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def write_all(fd: int, data: bytes) -> None:
    """Writes all of it, also to a terminal or pipe that takes it in parts."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


def require_terminal() -> None:
    """Raises ValueError where -t cannot work."""
    if not sys.stdin.isatty():
        raise ValueError("the input device is not a terminal: leave out -t, or run from a terminal")
