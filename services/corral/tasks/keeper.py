"""What a zygote keeps of a container whose shim was killed, for who finds another shim (corral.shim.keeping).

here --<bundle>/keeper--> zygote        {"exec":EXEC,"streams":[NAME...]} + fds, once for each process, then EOF;
                                        of an exec that runs, also {"pid":PID,"start_time":TICKS,"started_at_ns":NS}
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from corral.shim.wire import Channel, ProtocolError, close_all
from corral.tasks.identity import Identity
from corral.tasks.model import optional_int

SOCKET = "keeper"


class Kept(NamedTuple):
    """What is kept of one process; of an exec that runs also who it is, and since when."""

    streams: dict[str, int]
    identity: Identity | None
    started_at_ns: int


def fetch(directory: Path, *, timeout_s: float) -> Mapping[str, Kept] | None:
    """What a zygote keeps of a bundle whose shim was killed, by exec id; None if none does. The fds are the caller's.
    Blocks."""
    found: dict[str, Kept] = {}
    try:
        with contextlib.closing(Channel(_connected(directory, timeout_s))) as channel:
            found.update(_received(channel))
    except (OSError, ProtocolError):
        for kept in found.values():
            close_all(tuple(kept.streams.values()))
        return None
    return found


def _received(channel: Channel) -> Iterator[tuple[str, Kept]]:
    while True:
        try:
            for message in channel.receive():
                names = message.get("streams")
                if isinstance(names, list):
                    streams = dict(zip(map(str, names), channel.take_fds(len(names)), strict=True))
                    pid, start_time = optional_int(message, "pid"), optional_int(message, "start_time")
                    identity = Identity(pid, start_time) if pid and start_time else None
                    at_ns = optional_int(message, "started_at_ns") or 0
                    yield str(message.get("exec")), Kept(streams, identity, at_ns)
        except EOFError:
            return


def _connected(bundle: Path, timeout_s: float) -> socket.socket:
    directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(f"/proc/self/fd/{directory}/{SOCKET}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock
