"""Cgroups of one's own, and processes born in them."""

import contextlib
import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from corral.kernel import process
from corral.kernel.cgroup import Cgroup, Kind, Layout, birthplace, detect, join

_numbers = itertools.count()


def layouts() -> dict[str, Layout]:
    """The layouts that this host can show a driver: its own, and on a hybrid one also v1 alone."""
    try:
        host = detect()
    except OSError:
        return {}
    found = {host.kind.value: host}
    if host.kind is Kind.HYBRID:
        found["v1"] = Layout(Kind.V1, tuple(h for h in host.hierarchies if h.version == 1))
    return found


def layouts_without_v1_devices() -> dict[str, Layout]:
    """On a hybrid host, its layout as if the v1 devices controller were not mounted."""
    host = layouts().get("hybrid")
    if host is None:
        return {}
    rest = tuple(h for h in host.hierarchies if "devices" not in h.controllers)
    return {"hybrid-without-devices": Layout(Kind.HYBRID, rest)}


def parent() -> str:
    """The parent of every cgroup that this process makes for a test."""
    return f"/corral-test-{os.getpid()}"


def fresh_path() -> str:
    """A path that no other test has."""
    return f"{parent()}/ns/c{next(_numbers)}"


@dataclass(slots=True)
class Child:
    """A process in a cgroup. Its exit status, in the form of wait(2), and its CPU time come from wait()."""

    pid: int
    pidfd: int
    said: int

    def wait(self) -> int:
        """Wait for its end."""
        return self.end()[0]

    def end(self) -> tuple[int, float]:
        """The exit status and the CPU seconds that it used."""
        _, status, usage = os.wait4(self.pid, 0)
        self.pid = 0
        return status, usage.ru_utime + usage.ru_stime

    def hear(self, count: int = 1) -> bytes:
        """What the body wrote to its fd."""
        return os.read(self.said, count)

    def alive(self) -> bool:
        """Whether it has not yet ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


@contextlib.contextmanager
def inside(group: Cgroup, body: Callable[[int], object]) -> Iterator[Child]:
    """Run body(fd) in a child process born in the cgroup; what it writes to fd is there to hear()."""
    v2, rest = birthplace(group.paths())
    said, say = os.pipe()
    with contextlib.ExitStack() as fds:
        cgroup = os.open(v2, os.O_RDONLY | os.O_DIRECTORY) if v2 else None
        if cgroup is not None:
            fds.callback(os.close, cgroup)
        pid, pidfd = process.clone(0, cgroup=cgroup)
        if pid == 0:
            _run(rest, say, body)
        os.close(say)
        fds.callback(os.close, said)
        fds.callback(os.close, pidfd)
        child = Child(pid, pidfd, said)
        fds.callback(_end, child)
        assert child.hear() == b"!", "the child could not join"
        yield child


def _run(rest: list[Path], say: int, body: Callable[[int], object]) -> NoReturn:
    code = 1
    try:
        join(rest)
        os.write(say, b"!")
        body(say)
        code = 0
    except OSError as e:
        code = e.errno or 1
    except BaseException:  # noqa: BLE001 - of a forked child, which must never return
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def _end(child: Child) -> None:
    if child.pid:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(child.pidfd, signal.SIGKILL)
        child.wait()


def spin(seconds: float) -> None:
    """Use as much CPU time as one gets, for a time by the clock."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def sleep(_: int) -> None:
    """A body that does nothing."""
    time.sleep(3600)  # whoever began it ends it; an emulated machine takes minutes for some tests


def eventually(condition: Callable[[], object], *, within_s: float = 10.0) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
