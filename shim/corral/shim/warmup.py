"""Running a shim's code in the zygote, on containers that end before they begin, so that the shims to come need not.

The interpreter rewrites code while it first runs it, and fills caches: in a shim each such write costs a private page,
and the slow first runs cost time. What was warmed up is shared, and fast, in all of them.

Each round is the life of one container whose root is an empty tmpfs, so its program is not found. Its bundle lies on a
tmpfs that is mounted nowhere. Nothing stays: no file, no process, no descriptor.
"""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from corral.kernel import mount
from corral.kernel.failpoint import VARIABLE
from corral.oci import OCI_VERSION
from corral.oci.larder import Larder
from corral.shim import records
from corral.shim.loop import Loop
from corral.shim.server import Server
from corral.shim.wire import Message, encode

ROUND_S = 2.0
# init mounts the root over its bundle, which therefore can't be on a mount that has no place.
_MOUNT_POINT = Path("/tmp")  # noqa: S108 - nothing is written there
_TMPFS = {"type": "tmpfs", "source": "tmpfs"}
_PROCESS = {"cwd": "/", "args": ["/warm-up"], "env": ["PATH=/bin"], "noNewPrivileges": True}
_CONFIG: Message = {
    "ociVersion": OCI_VERSION,
    "process": _PROCESS,
    "root": {"path": "rootfs"},
    "hostname": "warm-up",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {**_TMPFS, "destination": "/dev", "options": ["nosuid", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
        {**_TMPFS, "destination": "/run", "options": ["nosuid", "noexec", "nodev", "mode=1777"]},
    ],
    "linux": {"namespaces": [{"type": name} for name in ("mount", "pid", "ipc", "uts")]},
}


_STATE: list[Message] = [{"op": "state"}] * 8


def warm_up(rounds: int) -> None:
    """Exercise what a shim does most. What this host does not allow stays cold, and all if failpoints are armed."""
    if os.environ.get(VARIABLE):
        return  # they are for shims to meet
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for _ in range(rounds):
            bundle = mount.new_mount("tmpfs", "tmpfs", ("size=4m",))
            try:
                _round(bundle)
            finally:
                os.close(bundle)
    except OSError:
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _round(bundle: int) -> None:
    path = Path(f"/proc/self/fd/{bundle}")
    records.write_json(bundle, "config.json", _CONFIG, step="zygote.warm_up")
    (path / "rootfs").mkdir()
    with contextlib.ExitStack() as stack:
        loop = Loop()
        stack.callback(loop.close)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(path / "socket"))
        listener.listen()
        larder = Larder()
        larder.stock()
        server = Server(loop, larder=larder)
        stack.callback(server.close)
        server.begin()
        server.be_of({"bundle": os.fspath(path), "namespace": "warm-up", "container": "warm-up"}, listener)
        server.bundle.path = _MOUNT_POINT
        client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        client.setblocking(False)
        client.connect(os.fspath(path / "socket"))
        _talk(loop, client, _requests(os.fspath(path / "log")))


def _requests(log: str) -> list[Message]:
    create: Message = {
        "op": "create",
        "rootfs": [_TMPFS],
        "stdin": True,
        "log": {"driver": "json-file", "path": log},
        "cgroup": {"paths": []},
    }
    return [
        {"op": "subscribe"},
        create,
        *_STATE,
        {"op": "kill", "exec": "", "signal": 0},
        {"op": "resize", "exec": "", "width": 80, "height": 24},
        {"op": "exec", "exec": "one", "process": _PROCESS},
        {"op": "start", "exec": ""},
        {"op": "state"},
        {"op": "close_stdin", "exec": ""},
    ]


def _talk(loop: Loop, client: socket.socket, requests: list[Message]) -> None:
    """Send each request and wait for some answer, then for the end."""
    client.send(encode({"v": 1, "client": "warm-up"}))
    deadline = time.monotonic() + ROUND_S
    for number, request in enumerate(requests):
        client.send(encode({"id": number, **request}))
        while not _received(client) and time.monotonic() < deadline:
            loop.step(0.05)
    while loop.step(0.02) and time.monotonic() < deadline:
        _received(client)


def _received(client: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        return bool(client.recv(1 << 16))
    return False
