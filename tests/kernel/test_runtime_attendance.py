"""A child of the runtime that has said all it had to, and then does not do what is left: to end."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.kernel import process
from corral.oci.attendance import ProcessHandle, await_ready
from corral.oci.channel import ChildEnd, ParentEnd, make_pair
from corral.oci.container import Container
from corral.oci.spec import Spec

pytestmark = pytest.mark.timeout(20, method="signal")

NOBODY = 2**22 + 1
"""Above the largest pid."""


def child_saying_ready(*, successor: int | None) -> tuple[ParentEnd, int, int]:
    """A child that hands over a console and says who goes on (None: a process that it makes); and then stops."""
    parent, channel = make_pair()
    pid, pidfd = process.clone(0)
    if pid == 0:
        try:
            stop_instead_of_ending(channel, successor)
        finally:
            os._exit(1)
    channel.close()
    return parent, pid, pidfd


def stop_instead_of_ending(channel: ChildEnd, successor: int | None) -> None:
    if successor is None:
        successor, _ = process.clone(process.CLONE_PARENT)
        if successor == 0:
            signal.pause()
    channel.send_ready(os.open("/dev/null", os.O_RDWR), successor=successor)
    os.kill(os.getpid(), signal.SIGSTOP)


def ready(parent: ParentEnd, pid: int, pidfd: int) -> ProcessHandle:
    container = Container(Spec.from_json({"ociVersion": "1.2.0"}), ProcessHandle(pid, pidfd, 0, None), parent)
    return await_ready(container, None, parent, pid, pidfd, 10, creating=True)


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
    process.send_signal(handle.pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, handle.pidfd, os.WEXITED)
    assert handle.console is not None
    os.close(handle.console)
    os.close(handle.pidfd)
    parent.close()


@pytest.mark.usefixtures("fds")
def test_the_console_of_a_child_whose_successor_is_gone_is_closed() -> None:
    parent, pid, pidfd = child_saying_ready(successor=NOBODY)
    with pytest.raises(OSError, match="No such process"):
        ready(parent, pid, pidfd)
