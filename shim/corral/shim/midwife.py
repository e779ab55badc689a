"""Who becomes the init of a shim's container: a process that the shim has forked while it stood by.

    shim --{"op":"create",…,"bundle":…}--> midwife    both read config.json; this one plans, and opens what init gets
    shim --{"stdio":[…]} + fds--> midwife == init --{"born":PID} + its channel--> shim

The copies of page tables and pages that a newborn process of Python pays for are behind it by then, and init goes on
in its memory (corral.kernel.rebirth). Of both processors' time this takes more than a fork of the shim: so there is one
only where that was idle. If the midwife ends before there is an init, the shim makes that itself, and so meets, and
tells, what was wrong; as it does for a container that takes more talk between the two (runtime.needs_no_talk).
"""

import _socket
import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import NoReturn

from corral.kernel import paths, process, rebirth, shared_memory
from corral.oci import runtime
from corral.oci.channel import ParentEnd
from corral.oci.larder import Larder
from corral.oci.secret_files import SecretFiles
from corral.oci.stdio import Stdio
from corral.shim.config import read_spec
from corral.shim.fields import array, integer, text
from corral.shim.requests import Create
from corral.shim.wire import Channel, Message, ProtocolError

PATIENCE_S = 10.0


class Midwife:
    """The shim's side of it."""

    def __init__(self, channel: Channel, pid: int) -> None:
        channel.sock.settimeout(PATIENCE_S)  # what is told may be more than the socket holds of it
        self._channel = channel
        self._pid = pid
        self._is_there = True
        self._is_done = False

    def order(self, message: Message, bundle: os.PathLike[str]) -> None:
        """Tell which container it is about."""
        self._tell({**message, "bundle": os.fspath(bundle)})

    def __call__(self, stdio: Stdio) -> runtime.Newborn | None:
        """An init of that container, which is this process's child; None if it is to be made here."""
        places = stdio.stdin, stdio.stdout, stdio.stderr
        self._tell({"stdio": [fd is not None for fd in places]}, [fd for fd in places if fd is not None])
        if not self._is_there:
            return None
        try:
            newborn = self._receive()
            self._is_done = True
            return newborn
        except (EOFError, ProtocolError):
            return None
        except TimeoutError:
            os.kill(self._pid, signal.SIGKILL)  # it is stuck; nobody has reaped it
            return None

    def _receive(self) -> runtime.Newborn:
        message = next(_messages(self._channel))
        pid, (end,) = integer(message, "born"), self._channel.take_fds(1)
        return runtime.Newborn(ParentEnd(_socket.socket(fileno=end)), pid, process.pidfd_open(pid))

    def dismiss(self) -> None:
        """It is not needed any more. If init is there and set up, what it has left to do is not urgent."""
        if self._is_there:
            self._is_there = False
            self._channel.close()
        if self._is_done:
            with contextlib.suppress(OSError):  # a filter may refuse it, and init is there all the same
                os.sched_setscheduler(self._pid, os.SCHED_IDLE, os.sched_param(0))  # nobody has reaped it

    def _tell(self, message: Message, fds: Sequence[int] = ()) -> None:
        if self._is_there:
            try:
                self._channel.send(message, fds)
            except (EOFError, ProtocolError):
                self.dismiss()


def fork(larder: Larder) -> Midwife | None:
    """One that waits for its order, with what is in the larder; None where there can be none."""
    if not rebirth.POSSIBLE:
        return None
    ours, its = socket.socketpair()
    with its:
        try:
            pid = process.fork()
        except OSError:
            ours.close()
            return None
        if pid == 0:
            _attend(its, larder)
    return Midwife(Channel(ours), pid)


def _attend(sock: socket.socket, larder: Larder) -> NoReturn:
    with contextlib.suppress(BaseException):  # the shim meets the same, and tells it
        process.close_fds((0, 1, 2, sock.fileno(), *larder.fds))
        process.set_name("corral-midwife")
        shared_memory.own_pages()
        _deliver(Channel(sock), larder)
    os._exit(1)


def _deliver(channel: Channel, larder: Larder) -> None:
    messages = _messages(channel)
    order = next(messages)
    bundle, request = text(order, "bundle"), Create.parse(order)
    with paths.opened(os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
        spec = read_spec(request, directory)

    def stdio() -> Stdio:
        given = array(next(messages), "stdio")
        fds = iter(channel.take_fds(given.count(True)))
        stdin, stdout, stderr = (next(fds) if each else None for each in given)
        return Stdio(stdin, stdout, stderr)

    runtime.go_on_as_init(
        spec,
        bundle=bundle,
        rootfs=request.rootfs,
        parts=request.parts,
        user=request.user,
        cgroup_paths=request.cgroup_paths,
        stdio=stdio,
        console_size=request.console_size,
        larder=larder,
        secrets=SecretFiles(request.secrets) if request.secrets else None,
        images=request.images,
        tell=lambda pid, end: channel.send({"born": pid}, [end]),
    )


def _messages(channel: Channel) -> Iterator[Message]:
    while True:
        yield from channel.receive()
