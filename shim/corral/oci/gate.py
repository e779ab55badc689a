"""Where the init of a container waits for start once the runtime that made it has ended.

A gate is a listening socket, bound by whoever creates the container where only the host's root gets at it. init keeps
it over the entry into the container, without a name there. Whoever connects and says so starts the container, and hears
over that connection, as over a channel, how it went.
"""

import _socket as socket  # the part in C, which has all that is used here and takes a tenth of the time to load
import os
import signal

from corral.kernel import process
from corral.oci.channel import ChildEnd


def make_gate(path: str) -> socket.socket:
    """Bind a gate to a path of at most 107 bytes. The caller closes it once init has it; its name stays."""
    gate = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        gate.bind(path)
        gate.listen(1)
    except BaseException:
        gate.close()
        raise
    return gate


def connect(path: str) -> socket.socket:
    """Go to a gate. Raises FileNotFoundError or ConnectionRefusedError if nobody waits there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def is_attended(path: str) -> bool:
    """Whether somebody waits at the gate, who does not mind. Its name outlives that where a start was killed."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except BlockingIOError:  # others have just knocked
        return True
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    finally:
        probe.close()
    return True


def wait_at(gate: int, channel: ChildEnd) -> ChildEnd:
    """Let go of the channel to the runtime and wait for who starts this process: the channel to that one.

    Until then it ends by the signals that end a process, as runc's does.
    """
    _end_by_signals()
    channel.close()
    listener = socket.socket(fileno=gate)
    while True:
        fd, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - what accept() calls
        started_by = ChildEnd(socket.socket(fileno=fd))
        if started_by.wait_for_start():
            os.close(listener.detach())
            process.reset_signals()
            return started_by
        started_by.close()


def _end_by_signals() -> None:
    """Have what ends others end a pid 1 too, which is deaf to it otherwise: with 128 and the number of the signal."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, _end_by)
    process.unblock_signals()


def _end_by(number: int, _frame: object) -> None:
    os._exit(128 + number)
