"""corrald and corral without the time that they take to load, which is most of what a short life of theirs costs.

    tests --socket--> this, which has loaded the program --clone3(CLONE_PARENT)--> the program, a child of the tests

`pytest --preloaded` has tests start them so; else, and where a test says how a daemon is started, the command itself is
executed. From the fork on the two are the same: arguments, environment, standard streams and exit code. But a daemon so
started has its zygote do without what only pays after hundreds of containers, and takes most of a second.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

MAX_REQUEST_BYTES = 1 << 20
# Set by the programs, before they load grpc.
GRPC_VARIABLES = ("GRPC_ENABLE_FORK_SUPPORT", "GRPC_VERBOSITY")

ENTRIES = {"corral.daemon": "corral.daemon.main", "corral.cli": "corral.cli.command"}
"""Where the installed command of each program begins."""

LOADED_AT_ONCE = ("corral.network.netlink", "corral.network.rtnetlink", "grpc_reflection.v1alpha.reflection")
"""By a daemon's services, once they are made."""


UNPREPARED = (
    "import corral.shim.zygote as zygote; from corral.kernel import shared_memory; from corral.shim import preload; "
    "preload.WARM_UP_ROUNDS = 2; shared_memory.gather_code = shared_memory.make_immortal = lambda *_: 0; zygote.main()"
)
"""How a zygote begins that warms up a little, and leaves its memory as it is."""


class Forked:
    """As much of subprocess.Popen as is wanted of a child of ours that another process has made."""

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid = pid
        self.args = args
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                    os.close(self._pidfd)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or -signal. Raises subprocess.TimeoutExpired."""
        code = self.poll()
        if code is None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            poll.poll(None if timeout is None else timeout * 1000)
            code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Preloaded:
    """A process that has loaded `package` and forks its program on request."""

    def __init__(self, package: str) -> None:
        self._package = package
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(its.fileno()), package],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                # Failpoints are looked for by a process that has some when it loads. This one is nowhere.
                env=os.environ | {"CORRAL_FAILPOINTS": "nowhere=error"},
            )
        self._socket = ours
        self._lock = threading.Lock()

    def fork(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        streams: Sequence[IO[bytes]],
        *,
        netns: Path | None = None,
    ) -> Forked:
        """Start the program with these arguments, environment, stdin, stdout and stderr, in a network namespace."""
        request = {
            "arguments": arguments,
            "environment": dict(environment),
            "directory": str(Path.cwd()),
            "netns": str(netns or ""),
        }
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [stream.fileno() for stream in streams])
            return Forked(int(self._socket.recv(100)), [self._package, *arguments])

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, timeout_s: float, check: bool
    ) -> subprocess.CompletedProcess[bytes]:
        """As subprocess.run() with an empty stdin."""
        with open(os.devnull, "rb") as null, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = self.fork(arguments, environment, (null, out, err))
            try:
                code = process.wait(timeout_s)
            except BaseException:
                process.kill()
                process.wait()
                raise
            for file in (out, err):
                file.seek(0)
            done = subprocess.CompletedProcess(process.args, code, out.read(), err.read())
        if check:
            done.check_returncode()
        return done

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class Programs:
    """What was loaded, if `--preloaded` asks for it; each at its first use."""

    def __init__(self) -> None:
        self.wanted = False
        self._loaded: dict[str, Preloaded] = {}
        self._lock = threading.Lock()

    def get(self, package: str) -> Preloaded | None:
        with self._lock:
            if self.wanted and package not in self._loaded:
                self._loaded[package] = Preloaded(package)
            return self._loaded.get(package)

    def close(self) -> None:
        self.wanted = False
        while self._loaded:
            self._loaded.popitem()[1].close()


PROGRAMS = Programs()


# The process that is forked from


def serve(control: socket.socket, package: str) -> None:
    """Fork a program for each request, until the other end is closed. A fork ends as the program does."""
    from corral.kernel.process import CLONE_PARENT, clone

    main = importlib.import_module(ENTRIES[package]).main
    load(package)
    gc.collect()
    gc.freeze()
    while True:
        data, fds, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 3)
        if not data:
            return
        pid, pidfd = clone(CLONE_PARENT)
        if pid == 0:
            control.close()
            become(package, fds, **json.loads(data))
            sys.exit(main())
        for fd in (pidfd, *fds):
            os.close(fd)
        control.send(str(pid).encode())


def load(package: str) -> None:
    """What every run of the program loads, and of the command all verbs."""
    if package == "corral.daemon":
        from corral.daemon.table import TABLE

        for entry in TABLE.values():
            entry.service_class()
        for name in LOADED_AT_ONCE:
            importlib.import_module(name)
        from corral.tasks import zygote

        sealing, found, _ = zygote._PROGRAM.partition("from corral.shim.zygote import main")
        assert found
        zygote._PROGRAM = f"{sealing}{UNPREPARED}"
        return
    for name in (package, "corral.client.sync"):
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(module.name)


def become(
    package: str,
    fds: Sequence[int],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    netns: str,
) -> None:
    """Be as if just executed."""
    from corral.kernel import failpoint

    if netns:
        with open(netns, "rb") as namespace:
            os.setns(namespace.fileno(), os.CLONE_NEWNET)
    for place, fd in enumerate(fds):
        os.dup2(fd, place)
        os.close(fd)
    os.chdir(directory)
    kept = {name: os.environ[name] for name in GRPC_VARIABLES if name in os.environ}
    os.environ.clear()
    os.environ.update({**kept, **environment})
    time.tzset()
    failpoint._triggers = failpoint.parse(environment.get(failpoint.VARIABLE, ""))
    sys.argv = [package, *arguments]


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
