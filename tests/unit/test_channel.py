"""The channel between the runtime and what it sets up: what a child may send that is not what it should."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.oci.channel import ChildEnd, ParentEnd
from corral.oci.errors import ExecFailed


def patience() -> None:
    raise AssertionError("nothing came")


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def ends() -> Iterator[tuple[ParentEnd, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ParentEnd(ours), theirs


@pytest.mark.parametrize(
    "message",
    [
        b'{"ready":true}',
        b'{"error":"setup","message":"woe"}',
        b'{"listener":true}',
        b'{"hooks":true}',
        b"nonsense",
        b"[]",
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 60])
def test_descriptors_that_nobody_asked_for_are_closed(
    ends: tuple[ParentEnd, socket.socket], message: bytes, count: int
) -> None:
    parent, child = ends
    before = open_fds()
    for receive in (
        lambda: parent.receive_ready(os.getpid(), patience),
        lambda: parent.receive(os.getpid(), "devices", patience),
        lambda: parent.wait_for_exec(patience),
    ):
        socket.send_fds(child, [message], [0] * count)
        console = None
        with contextlib.suppress(ExecFailed):
            console, _ = receive() or (None, None)
        if console is not None:
            os.close(console)
        assert open_fds() == before


def test_an_answer_may_be_longer_than_a_message(ends: tuple[ParentEnd, socket.socket]) -> None:
    parent, child = ends
    value = ["x" * 1000] * 60
    parent.send_answer(value, patience)
    assert ChildEnd(child).receive_answer() == value
    parent.close()
    assert ChildEnd(child).receive_answer() is None
