"""The zygote: one Python process with the shim imported, which forks a shim on request in about a millisecond.

    tasks --socketpair, fd 3--> zygote --fork--> shim

    {"id":1,"op":"spawn","bundle":PATH,"namespace":NS,"container":ID} + its listening socket
        --> {"id":1,"ok":{"pid":PID,"start_time":TICKS}}
    {"id":1,"op":"stand_by"} + a connection --> the same, of a shim that waits there for {"bundle":…} + its socket
    {"id":1,"op":"ready"} --> {"id":1,"ok":{}}, once all is imported
    EOF on fd 3 ends the zygote, once it has no child and keeps nothing any more.

One shim is always ready ahead, forked and waiting for its bundle, so that a request waits neither for fork(2) nor for a
newborn's page faults, nor for the mounts that every container has. It takes its orders over a socketpair and ends with
the zygote while it has none. One that stands by takes them from its client instead, which so asks it for the container
in the same breath, and ends with that, too.

Each shim is a session of its own, so killing the zygote harms none of them: they become init's. Until then the zygote
reaps them, which not every init does, and inherits what a shim that was killed leaves behind: it keeps the output from
being lost until another shim reads it, and should a container's process end, writes its exit to the bundle in the
shim's place (see orphans.py). What has no name it has copies of (see keeping.py). So it stays for them when its daemon
has gone.

It holds host privilege and its children are what sets up containers, so it runs sealed (see seal.py) and non-dumpable.
"""

import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from corral.kernel import process, signalfd
from corral.kernel.failpoint import failpoint
from corral.oci.larder import Larder
from corral.oci.rehearsal import Typical
from corral.shim import oom, orphans, preload, report, seal
from corral.shim.errors import ShimError, from_os_error
from corral.shim.fields import text
from corral.shim.keeping import Keeper, Kept
from corral.shim.loop import IN, Loop, Timer
from corral.shim.orphans import Orphaned
from corral.shim.process import Ended
from corral.shim.server import Server
from corral.shim.wire import Channel, Message, ProtocolError

CONTROL_FD = 3


def main() -> None:
    """Be the zygote. Started as `python -I -S -c … ` with a connected socket as fd 3."""
    seal.be_sealed()
    _settle()
    typical = Typical()
    preload.preload(typical)
    Zygote(Channel(socket.socket(fileno=CONTROL_FD)), typical).run()


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
    process.set_child_subreaper()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


# The next spare is forked once the shim that was asked for has begun: while that and its init are at work nobody else
# is, so another processor is free. What is asked for next, the daemon and its client would be kept from theirs by it.
SPARE_PAUSE_S = 0.001
LOOK_S = 0.2


@dataclass(slots=True)
class Spare:
    """A shim that has no bundle yet."""

    pid: int
    start_time: int
    orders: Channel

    def tell(self, order: Message, fd: int) -> bool:
        """Tell it which bundle is its own, or who will; False if it is dead. What comes over orders from then on is to
        be kept."""
        try:
            self.orders.send(order, (fd,))
        except EOFError:
            self.orders.close()
            return False
        return True


class Zygote:
    """Forks shims until the other end of its control socket is closed."""

    def __init__(self, control: Channel, typical: Typical) -> None:
        """typical: for spares to try their hand on."""
        self._control = control
        self._typical = typical
        self._loop = Loop()
        self._signals = signalfd.open_signalfd((signal.SIGCHLD,))
        self._kept: dict[int, Kept] = {}  # for living shims, by pid
        self._orphaned: dict[Path, Orphaned] = {}  # of shims that were killed
        self._spare: Spare | None = None
        self._standby: Kept | None = None
        self._abandoned = False
        self._look_again: Timer | None = None

    def run(self) -> None:
        """Serve until the end."""
        self._loop.call_later(SPARE_PAUSE_S, self._make_spare)
        self._loop.watch(self._control.sock.fileno(), IN, lambda _events: self._on_control())
        self._loop.watch(self._signals, IN, lambda _events: self._on_child())
        self._loop.run()

    def _on_control(self) -> None:
        try:
            for message in self._control.receive():
                self._control.send(self._answer(message))
        except EOFError:
            self._loop.forget(self._control.sock.fileno())
            self._control.sock.close()
            self._abandoned = True
            if self._spare is not None:
                self._spare.orders.sock.close()  # which ends it
            self._end_if_alone()

    def _end_if_alone(self) -> None:
        """Without a daemon: stay while there is a child to reap, or something kept that no shim has taken over yet."""
        self._reap()  # also who ended while this process was warming up, and nobody listened
        self._look_after_orphaned()
        if not any(orphaned.is_held for orphaned in self._orphaned.values()) and not self._has_children():
            self._loop.stop()

    def _look_after_orphaned(self) -> None:
        """Let go of what has a shim again, now and, while there is more, later."""
        for bundle in [bundle for bundle, orphaned in self._orphaned.items() if orphaned.has_heir()]:
            self._orphaned.pop(bundle).close()
        if self._orphaned:
            self._look_soon()

    def _look_soon(self) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        self._look_again = self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        if self._abandoned:
            self._end_if_alone()
        else:
            self._look_after_orphaned()

    def _has_children(self) -> bool:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def _answer(self, message: Message) -> Message:
        number = message.get("id")
        try:
            match message.get("op"):
                case "ready":
                    return {"id": number, "ok": {}}
                case "spawn":
                    return {"id": number, "ok": self._spawn(message)}
                case "stand_by":
                    return {"id": number, "ok": self._stand_by()}
                case other:
                    raise ShimError("unimplemented", f"the zygote has no operation {other!r}")
        except ShimError as e:
            error = e
        except ProtocolError as e:
            error = ShimError("invalid_argument", str(e))
        except OSError as e:
            error = from_os_error(e)
        return {"id": number, "error": {"kind": error.kind, "message": str(error)}}

    def _spawn(self, message: Message) -> Message:
        order: Message = {name: text(message, name) for name in ("bundle", "namespace", "container")}
        spare = self._tell_spare(order, Path(text(message, "bundle")))
        self._loop.call_later(SPARE_PAUSE_S, self._make_spare)
        return {"pid": spare.pid, "start_time": spare.start_time}

    def _stand_by(self) -> Message:
        spare = self._tell_spare({"stand_by": True}, None)
        self._standby = self._kept[spare.pid]
        return {"pid": spare.pid, "start_time": spare.start_time}

    def _tell_spare(self, order: Message, bundle: Path | None) -> Spare:
        """Or another one if it is dead, with the descriptor that came with the request."""
        (fd,) = self._control.take_fds(1)
        try:
            failpoint("zygote.spawn.before_fork")
            spare, self._spare = self._spare, None
            if spare is None or not spare.tell(order, fd):
                spare = self._fork_spare()
                if not spare.tell(order, fd):
                    raise ShimError("unavailable", "the shim ended before it was told what to do")
            kept = self._kept[spare.pid] = Kept(self._loop, spare.orders, bundle)
            kept.begin()
        finally:
            os.close(fd)
        failpoint("zygote.spawn.after_fork")
        return spare

    def _make_spare(self) -> None:
        """Not while one stands by: who takes that should have the processors, and asks for the next one itself."""
        if self._spare is None and not self._abandoned and not (self._standby and self._standby.stands_by):
            with contextlib.suppress(OSError):  # a request will meet the same error and tell it
                self._spare = self._fork_spare()

    def _fork_spare(self) -> Spare:
        ours, its = socket.socketpair()
        with its:
            try:
                pid = process.fork()
            except BaseException:
                ours.close()
                raise
            if pid == 0:
                _become_shim(its, self._typical)
        # Not reaped before the handler that calls this returns, so the pid is the shim's even if that is dead already.
        return Spare(pid, process.start_time(pid), Channel(ours))

    def _on_child(self) -> None:
        """Reap shims that have ended, and orphans of those that were killed."""
        signalfd.read_signals(self._signals)
        self._reap()
        if self._abandoned:
            self._end_if_alone()

    def _reap(self) -> None:
        while True:
            try:
                # Looked at only: what an end tells is written down before the process is gone, for whoever asks then.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            self._child_ended(info.si_pid, Ended.from_waitid(info, time.time_ns()))
            os.waitpid(info.si_pid, 0)

    def _child_ended(self, pid: int, ended: Ended) -> None:
        if self._spare is not None and pid == self._spare.pid:
            self._spare.orders.close()
            self._spare = None
            return
        kept = self._kept.pop(pid, None)
        if kept is None:
            self._orphan_ended(pid, ended)
            return
        kept.drain()
        bundle = kept.bundle
        if ended.code and bundle is not None:
            before, self._orphaned[bundle] = self._orphaned.get(bundle), Orphaned(self._loop, bundle, kept)
            if before is not None:
                before.close()
            self._look_soon()
        else:
            kept.close()

    def _orphan_ended(self, pid: int, ended: Ended) -> None:
        """Its shim may be dying only just now, and not be orphaned yet."""
        bundles = list(self._orphaned)
        for kept in self._kept.values():
            kept.drain()
            if kept.bundle is None:
                continue
            if orphans.write_exec_exit(kept.bundle, kept, pid, ended):
                return
            bundles.append(kept.bundle)
        if not any(orphaned.exec_ended(pid, ended) for orphaned in self._orphaned.values()):
            orphans.write_exit(bundles, pid, ended)


def _become_shim(orders: socket.socket, typical: Typical) -> NoReturn:
    status, server = 1, None
    try:
        os.setsid()
        os.dup2(0, 2)
        process.close_fds((0, 1, 2, orders.fileno()))
        process.set_name("corral-shim")
        process.set_child_subreaper()
        oom.protect_this_process()
        loop = Loop()
        larder = Larder()
        with contextlib.suppress(OSError):  # init will meet the same error and tell it
            larder.stock()
        with contextlib.suppress(Exception):  # it is but to be quicker later, and no reason to be no shim
            typical.plan()
        to_zygote = Channel(orders)
        server = Server(loop, larder=larder, keeper=Keeper(to_zygote))
        server.begin(to_zygote)
        loop.run()
        if server.bundle.path is not None:
            failpoint("shim.end.after_hang_up")
        status = 0
    except BaseException as e:  # noqa: BLE001 - the last frame of this process
        if server is not None:
            report.write(server.bundle.directory, report.describe(e))
    finally:
        os._exit(status)
