"""What a zygote keeps of a container whose shim was killed, for who finds another shim (corral.shim.keeping).

here --<bundle>/keeper--> zygote        {"exec":EXEC,"streams":[NAME...]} + fds, once for each process, then EOF
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from corral.shim.wire import Channel, ProtocolError, close_all

SOCKET = "keeper"


def fetch(directory: Path, *, timeout_s: float) -> Mapping[str, dict[str, int]] | None:
    """What a zygote keeps of a bundle whose shim was killed, by exec id and name; None if none does. The fds are the
    caller's. Blocks."""
    found: dict[str, dict[str, int]] = {}
    try:
        with contextlib.closing(Channel(_connected(directory, timeout_s))) as channel:
            found.update(_received(channel))
    except (OSError, ProtocolError):
        for streams in found.values():
            close_all(tuple(streams.values()))
        return None
    return found


def _received(channel: Channel) -> Iterator[tuple[str, dict[str, int]]]:
    while True:
        try:
            for message in channel.receive():
                names = message.get("streams")
                if isinstance(names, list):
                    fds = channel.take_fds(len(names))
                    yield str(message.get("exec")), dict(zip(map(str, names), fds, strict=True))
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
