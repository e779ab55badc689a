"""A child of the runtime that does not do what is left to do: to end."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import namespaces, process
from corral.kernel.namespaces import Kind
from corral.oci.attendance import DYING_S, ProcessHandle, await_ready
from corral.oci.channel import ChildEnd, ParentEnd, make_pair
from corral.oci.container import Container
from corral.oci.errors import ExecFailed
from corral.oci.spec import Spec

pytestmark = pytest.mark.timeout(20, method="signal")

NOBODY = 2**22 + 1
"""Above the largest pid."""


def child(body: Callable[[], object], flags: int = 0) -> tuple[int, int]:
    pid, pidfd = process.clone(flags)
    if pid == 0:
        try:
            body()
        finally:
            os._exit(1)
    return pid, pidfd


def end(pidfd: int) -> None:
    process.send_signal(pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def child_saying_ready(*, successor: int | None) -> tuple[ParentEnd, int, int]:
    """A child that hands over a console and says who goes on (None: a process that it makes); and then stops."""
    parent, channel = make_pair()
    pid, pidfd = child(lambda: stop_instead_of_ending(channel, successor))
    channel.close()
    return parent, pid, pidfd


def stop_instead_of_ending(channel: ChildEnd, successor: int | None) -> None:
    if successor is None:
        successor, _ = process.clone(process.CLONE_PARENT)
        if successor == 0:
            signal.pause()
    channel.send_ready(os.open("/dev/null", os.O_RDWR), successor=True)
    channel.send_number(successor)
    os.kill(os.getpid(), signal.SIGSTOP)


@contextlib.contextmanager
def undying(say: Callable[[ChildEnd], None]) -> Iterator[tuple[ParentEnd, int, int]]:
    """A child that does not end when it is killed, as on a file system that does not answer; what it says before.

    It is the init of a PID namespace, which waits for all in there to be reaped: one has a parent outside, who does
    not do that.
    """
    parent, channel = make_pair()
    pid, pidfd = child(lambda: (say(channel), signal.pause()), Kind.PID.flag)
    channel.close()

    def neglect() -> None:
        namespaces.join(pidfd, Kind.PID.flag, what="the child's")
        child(signal.pause)
        signal.pause()

    neglectful, held = child(neglect)
    try:
        while not Path(f"/proc/{neglectful}/task/{neglectful}/children").read_text():
            time.sleep(0.01)
        yield parent, pid, pidfd
    finally:
        end(held)
        parent.close()
    assert os.waitpid(pid, 0) == (pid, signal.SIGKILL), "it is there for whoever collects the children"


def ready(parent: ParentEnd, pid: int, pidfd: int, limit_s: float = 10) -> ProcessHandle:
    container = Container(Spec.from_json({"ociVersion": "1.2.0"}), ProcessHandle(pid, pidfd, 0, None), parent)
    return await_ready(container, None, parent, pid, pidfd, limit_s, creating=True)


@pytest.fixture
def fds() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.usefixtures("fds")
def test_a_predecessor_that_is_stopped_holds_up_nobody() -> None:
    parent, pid, pidfd = child_saying_ready(successor=None)
    handle = ready(parent, pid, pidfd)
    assert handle.pid != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert handle.console is not None
    os.close(handle.console)
    end(handle.pidfd)
    parent.close()


@pytest.mark.usefixtures("fds")
def test_the_console_of_a_child_whose_successor_is_gone_is_closed() -> None:
    parent, pid, pidfd = child_saying_ready(successor=NOBODY)
    with pytest.raises(OSError, match="No such process"):
        ready(parent, pid, pidfd)


@needs("root")
@pytest.mark.usefixtures("fds")
def test_a_child_that_does_not_end_when_it_is_killed_is_given_up() -> None:
    with undying(lambda _: None) as (parent, pid, pidfd):
        began = time.monotonic()
        with pytest.raises(ExecFailed, match=r"was not set up within 0\.1 seconds"):
            ready(parent, pid, pidfd, limit_s=0.1)
        assert DYING_S <= time.monotonic() - began < DYING_S + 3


@needs("root")
@pytest.mark.usefixtures("fds")
def test_a_predecessor_that_does_not_end_is_left_behind() -> None:
    successor, held = child(signal.pause)

    def say(channel: ChildEnd) -> None:
        channel.send_ready(None, successor=True)
        channel.send_number(successor)

    with undying(say) as (parent, pid, pidfd):
        handle = ready(parent, pid, pidfd)
    assert handle.pid == successor
    os.close(held)
    end(handle.pidfd)
