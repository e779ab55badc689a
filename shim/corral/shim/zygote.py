"""The zygote: one Python process with the shim imported, which forks a shim on request in about a millisecond.

    tasks --socketpair, fd 3--> zygote --fork--> shim

    {"id":1,"op":"spawn","bundle":PATH,"namespace":NS,"container":ID} + its listening socket
        --> {"id":1,"ok":{"pid":PID,"start_time":TICKS}}
    EOF on fd 3 ends the zygote.

Each shim is a session of its own, so killing the zygote, or its ending, harms none of them: they become init's. Until
then the zygote reaps them, which not every init does. It holds host privilege and its children are
what sets up containers, so it runs sealed (see seal.py) and non-dumpable.
"""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from corral.kernel import process
from corral.kernel.failpoint import failpoint
from corral.shim import preload, report, seal
from corral.shim.errors import ShimError, from_os_error
from corral.shim.loop import Loop
from corral.shim.requests import text
from corral.shim.server import Server
from corral.shim.wire import Channel, Message, ProtocolError

CONTROL_FD = 3
SEALED = "--sealed"


def main() -> None:
    """Be the zygote. Started as `python -I -S -c … ` with a connected socket as fd 3."""
    if SEALED not in sys.argv:
        seal.execute_sealed(SEALED)
    if not seal.is_sealed():
        raise SystemExit("corral zygote: the interpreter could not be sealed")
    _settle()
    control = Channel(socket.socket(fileno=CONTROL_FD))
    preload.preload()
    try:
        while True:
            for message in control.receive():
                control.send(_answer(control, message))
    except EOFError:
        return


def _settle() -> None:
    """Keep nothing of the starter but fd 3 and its stderr."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    process.close_fds((0, 1, 2, CONTROL_FD))
    with contextlib.suppress(PermissionError):  # the starter did it already
        os.setsid()
    os.umask(0o077)
    os.chdir("/")
    process.set_dumpable(False)
    process.set_name("corral-zygote")
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _reap)


def _answer(control: Channel, message: Message) -> Message:
    number = message.get("id")
    try:
        if message.get("op") != "spawn":
            raise ShimError("unimplemented", f"the zygote has no operation {message.get('op')!r}")
        return {"id": number, "ok": _spawn(control, message)}
    except ShimError as e:
        error = e
    except ProtocolError as e:
        error = ShimError("invalid_argument", str(e))
    except OSError as e:
        error = from_os_error(e)
    return {"id": number, "error": {"kind": error.kind, "message": str(error)}}


def _spawn(control: Channel, message: Message) -> Message:
    bundle = Path(text(message, "bundle"))
    namespace, container = text(message, "namespace"), text(message, "container")
    (listener,) = control.take_fds(1)
    try:
        failpoint("zygote.spawn.before_fork")
        # Until its start time was read, a shim must stay at least a zombie, else the pid could be somebody else's.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
        pid = process.fork()
        if pid == 0:
            _become_shim(listener, bundle, namespace, container)
        start_time = process.start_time(pid)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))
        os.close(listener)
    failpoint("zygote.spawn.after_fork")
    return {"pid": pid, "start_time": start_time}


def _reap(_signal: int, _frame: object) -> None:
    """Shims that ended while the zygote lives; the others are init's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become_shim(listener: int, bundle: Path, namespace: str, container: str) -> NoReturn:
    status = 1
    try:
        failpoint("shim.spawned")
        os.setsid()
        os.dup2(0, 2)
        process.close_fds((0, 1, 2, listener))
        process.set_name("corral-shim")
        process.set_child_subreaper()
        _protect_from_oom()
        loop = Loop()
        Server(loop, socket.socket(fileno=listener), bundle, namespace=namespace, container=container).begin()
        loop.run()
        status = 0
    except BaseException as e:  # noqa: BLE001 - the last frame of this process
        _report(bundle, e)
    finally:
        os._exit(status)


def _protect_from_oom() -> None:
    """The container should be killed before its shim is; a host may not allow to ask for that."""
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"-998")
        finally:
            os.close(fd)
    except OSError:
        pass


def _report(bundle: Path, error: BaseException) -> None:
    directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    report.write(directory, report.describe(error))
