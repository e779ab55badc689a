"""Messages that wait for one receiver, over real sockets and the loop of a shim."""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from corral.shim.loop import LONGEST_WAIT_S, Loop
from corral.shim.outbox import PAUSE_S, RETRY_S, Outbox
from corral.shim.syslog import Address, SyslogReceiver

LIMIT = 1 << 20


@pytest.fixture
def loop() -> Iterator[Loop]:
    with closing(Loop()) as made:
        yield made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    with listening(tmp_path / "log") as made:
        yield made


def listening(path: Path, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, kind)
    server.bind(os.fspath(path))
    if kind == socket.SOCK_STREAM:
        server.listen()
    server.setblocking(False)
    return server


class Done:
    """What an outbox reports, by stream."""

    def __init__(self) -> None:
        self.bytes = {"stdout": 0, "stderr": 0}

    def __call__(self, stream: str, size: int) -> None:
        self.bytes[stream] += size


def outbox_to(loop: Loop, path: Path, done: Callable[[str, int], None], limit: int = LIMIT) -> Outbox:
    receiver = SyslogReceiver(Address("unix", str(path)))
    receiver.connect()
    return Outbox(loop, receiver, limit=limit, on_done=done)


def drained(loop: Loop, server: socket.socket, seconds: float) -> int:
    """How many messages arrive in that time."""
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        loop.step(0.01)
        try:
            while server.recv(65536):
                count += 1
        except BlockingIOError:
            pass
    return count


def test_a_timer_of_a_year_neither_comes_now_nor_ends_the_loop(loop: Loop) -> None:
    called = []
    loop.call_later(365 * 86400, lambda: called.append("a year"))
    assert loop._timeout() == LONGEST_WAIT_S
    loop.call_later(0.01, loop.stop)
    loop.run()
    assert called == []
    reader, writer = os.pipe()
    loop.watch(reader, 1, lambda _events: loop.stop())
    os.write(writer, b"x")
    loop.run()  # with nothing but the long timer to wait for
    loop.forget(reader)
    os.close(reader)
    os.close(writer)


def test_connecting_again_goes_on_with_what_waits(loop: Loop, server: socket.socket, tmp_path: Path) -> None:
    done = Done()
    with closing(outbox_to(loop, tmp_path / "log", done)) as outbox:
        for number in range(300):
            outbox.put("stdout", 1, b"%d" % number)
        assert done.bytes["stdout"] < 300
        outbox.reconnect()
        assert drained(loop, server, RETRY_S / 2) == 300
        outbox.put("stdout", 1, b"more")
        assert drained(loop, server, RETRY_S) == 1


def test_connecting_again_leaves_no_second_attempt_behind(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with listening(path):
        outbox = outbox_to(loop, path, Done())
    path.unlink()
    outbox.put("stdout", 1, b"waits")
    with closing(outbox), listening(path, socket.SOCK_STREAM) as server:
        outbox.reconnect()
        with closing(server.accept()[0]) as connection:
            connection.setblocking(False)
            assert drained(loop, connection, 0.1) == 1
            until = time.monotonic() + 1.5 * RETRY_S
            while time.monotonic() < until:
                loop.step(0.05)
            with pytest.raises(BlockingIOError):
                server.accept()


def test_the_first_words_after_a_long_silence_have_their_time(
    loop: Loop, server: socket.socket, tmp_path: Path
) -> None:
    with closing(outbox_to(loop, tmp_path / "log", Done())) as outbox:
        server.close()
        time.sleep(0.2)
        outbox.put("stdout", 5, b"words")
        assert not outbox.delivered(0.15)
        time.sleep(0.2)
        assert outbox.delivered(0.15)


def test_what_is_dropped_behind_a_message_that_is_half_sent_is_done_with_it_and_counted_at_once(
    loop: Loop, tmp_path: Path
) -> None:
    path, done, size = tmp_path / "log", Done(), 1 << 22
    with listening(path, socket.SOCK_STREAM) as server:
        outbox = outbox_to(loop, path, done, limit=1000)
        with closing(outbox), closing(server.accept()[0]) as connection:
            connection.setblocking(False)
            outbox.put("stdout", 7, bytes(size))
            outbox.put("stdout", 10, bytes(10))
            outbox.put("stderr", 20, bytes(10))
            outbox.put("stdout", 40, bytes(10))
            assert outbox.dropped_bytes == 70
            assert done.bytes == {"stdout": 0, "stderr": 20}
            drained(loop, connection, 0.5)
            assert outbox.dropped_bytes == 70
            assert done.bytes == {"stdout": 57, "stderr": 20}


def test_the_limit_is_one_of_memory_however_small_messages_are(
    loop: Loop, server: socket.socket, tmp_path: Path
) -> None:
    done = Done()
    with closing(outbox_to(loop, tmp_path / "log", done, limit=50_000)) as outbox:
        for _ in range(10_000):
            outbox.put("stdout", 1, b"x")
        assert drained(loop, server, 0.3) < 50_000 / 128 + 600  # those, and what the socket holds
        assert outbox.dropped_bytes > 9_000


def test_a_server_that_changes_from_streams_to_datagrams_is_spoken_to_in_those(tmp_path: Path) -> None:
    path = tmp_path / "log"
    receiver = SyslogReceiver(Address("unix", str(path)))
    with closing(receiver):
        with listening(path, socket.SOCK_STREAM):
            receiver.connect()
            assert (receiver.is_stream, receiver.hears) == (True, True)
        path.unlink()
        with listening(path):
            receiver.connect()
            assert (receiver.is_stream, receiver.hears) == (False, False)


class WithoutMemory(SyslogReceiver):
    """A socket that can be written to, of a kernel that has no memory for a while."""

    asked = 0

    def send(self, message: bytes) -> int:
        self.asked += 1
        if self.asked < 5:
            raise BlockingIOError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return super().send(message)


def test_a_kernel_without_memory_is_not_asked_without_a_pause(
    loop: Loop, server: socket.socket, tmp_path: Path
) -> None:
    receiver = WithoutMemory(Address("unix", str(tmp_path / "log")))
    receiver.connect()
    with closing(Outbox(loop, receiver, limit=LIMIT, on_done=Done())) as outbox:
        outbox.put("stdout", 1, b"x")
        assert drained(loop, server, 2 * PAUSE_S) == 0
        assert receiver.asked < 5
        assert drained(loop, server, 5 * PAUSE_S) == 1
