"""How a client on its host gets pipes from the daemon: nobody else gets them, and it gets nobody else's."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from corral.cli import pipes
from corral.tasks import translate
from corral.tasks.attach import Taker


@pytest.fixture
def client() -> Iterator[pipes.Taker]:
    taker = pipes.Taker()
    yield taker
    taker.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def told(client: pipes.Taker) -> Taker:
    """What the daemon hears of it."""
    return translate.taker(client.request(stdin=False).take)


def test_it_gets_the_pipes_by_their_names(client: pipes.Taker, pipe: tuple[int, int]) -> None:
    assert told(client).give(pipe)
    received = client.receive(["stdout", "stderr"])
    assert [os.fstat(fd).st_ino for fd in received.values()] == [os.fstat(fd).st_ino for fd in pipe]
    assert list(received) == ["stdout", "stderr"]
    for fd in received.values():
        os.close(fd)


def test_who_has_only_found_the_socket_is_not_listened_to(client: pipes.Taker, pipe: tuple[int, int]) -> None:
    others = os.pipe()
    for secret in (b"\0", bytes(16)):
        assert replace(told(client), secret=secret).give(others)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(f"\0{told(client).name}")
        assert told(client).give(pipe[:1])
        (fd,) = client.receive(["stdout"]).values()
    assert os.fstat(fd).st_ino == os.fstat(pipe[0]).st_ino
    os.close(fd)
    for end in others:
        os.close(end)


def test_who_listens_under_the_name_of_one_that_is_gone_gets_nothing(pipe: tuple[int, int]) -> None:
    gone = pipes.Taker()
    expected = told(gone)
    gone.close()
    assert not expected.give(pipe)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"\0{expected.name}")
        other.listen()
        other.settimeout(5)
        assert not replace(expected, pid=os.getppid()).give(pipe)
        with other.accept()[0] as connection:
            said, fds, _, _ = socket.recv_fds(connection, 99, 9)
        assert (said, fds) == (b"", [])


def test_pipes_that_do_not_come_are_not_waited_for(client: pipes.Taker, pipe: tuple[int, int]) -> None:
    assert told(client).give(pipe)  # and of these one has not come
    with pytest.raises(ConnectionAbortedError):
        client.receive(["stdout"])


@pytest.mark.parametrize("name", ["", "dbus", "corral-" + "x" * 200, "corral-nobody"])
def test_a_name_that_is_none_of_a_client_is_refused(client: pipes.Taker, pipe: tuple[int, int], name: str) -> None:
    assert not replace(told(client), name=name).give(pipe)
