"""The asyncio client of the shim's wire, against a peer that speaks the shim's own implementation of it."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from corral.rpc.errors import FailedPrecondition, Internal, InvalidArgument, NotFound
from corral.shim.wire import Channel, Message, encode
from corral.tasks.connection import Connection, ConnectionLostError


class Peer:
    """The other end, blocking, driven by the tests."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel = Channel(sock)
        self.sock = sock
        self._messages: Iterator[Message] = iter(())

    def receive(self) -> Message:
        """The next one; its descriptors can be taken until the one after it is asked for."""
        while (message := next(self._messages, None)) is None:
            self._messages = self.channel.receive()
        return message

    def answer(self, message: Message) -> None:
        self.sock.sendall(encode(message))


@pytest.fixture
async def pair() -> AsyncIterator[tuple[socket.socket, Peer]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    yield ours, Peer(theirs)
    theirs.close()
    ours.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_replies_find_their_requests_in_any_order(pair: tuple[socket.socket, Peer]):
    sock, peer = pair
    connection = Connection(sock)
    first, second = connection.request("one", {"x": 1}), connection.request("two", {})
    assert peer.receive() == {"id": 1, "op": "one", "x": 1}
    assert peer.receive() == {"id": 2, "op": "two"}
    peer.answer({"id": 2, "ok": {"b": 2}})
    peer.answer({"id": 1, "ok": {"a": 1}})
    assert (await first, await second) == ({"a": 1}, {"b": 2})
    connection.close()


@pytest.mark.parametrize(
    ("kind", "expected", "reason"),
    [
        ("not_found", NotFound, ""),
        ("exec_not_found", NotFound, "EXEC_NOT_FOUND"),
        ("failed_precondition", FailedPrecondition, ""),
        ("of_the_future", Internal, ""),
    ],
)
async def test_errors_become_their_kinds(
    pair: tuple[socket.socket, Peer], kind: str, expected: type[Exception], reason: str
):
    sock, peer = pair
    connection = Connection(sock)
    asked = connection.request("x", {})
    peer.answer({"id": 1, "error": {"kind": kind, "message": "a sentence"}})
    with pytest.raises(expected, match="a sentence") as caught:
        await asked
    assert getattr(caught.value, "reason", "") == reason
    connection.close()


async def test_messages_cut_anywhere_and_events_in_between(pair: tuple[socket.socket, Peer]):
    sock, peer = pair
    events: list[Message] = []
    connection = Connection(sock, on_event=events.append)
    asked = connection.request("x", {})
    data = encode({"event": "a"}) + encode({"id": 1, "ok": {"text": "é" * 1000}}) + encode({"event": "b"})
    for start in range(0, len(data), 7):
        peer.sock.sendall(data[start : start + 7])
        await asyncio.sleep(0)
    assert (await asked)["text"] == "é" * 1000
    await asyncio.sleep(0.01)
    assert events == [{"event": "a"}, {"event": "b"}]
    connection.close()


async def test_a_peer_that_goes_away_fails_what_is_asked_and_is_told_once(pair: tuple[socket.socket, Peer]):
    sock, peer = pair
    closed: list[bool] = []
    connection = Connection(sock, on_close=lambda: closed.append(True))
    asked = connection.request("x", {})
    peer.sock.close()
    with pytest.raises(ConnectionLostError):
        await asked
    with pytest.raises(ConnectionLostError):
        await connection.request("y", {})
    assert closed == [True]
    assert not connection.is_open


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_the_last_words_of_a_peer_that_leaves_a_request_unread_are_heard_and_so_is_its_end(run: Callable[..., None]):
    """uvloop calls a reader once more, and no more than that, for a socket with an error: here ECONNRESET."""

    async def last_words() -> None:
        sock, theirs = socket.socketpair()
        events: list[Message] = []
        connection = Connection(sock, on_event=events.append)
        asked = connection.request("x", {})
        theirs.sendall(encode({"event": "a"}))
        Channel(theirs).send({"event": "b"}, (2,))  # the kernel ends a receive at descriptors
        theirs.close()
        with pytest.raises(ConnectionLostError):
            await asyncio.wait_for(asked, 10)
        assert events == [{"event": "a"}, {"event": "b"}]
        assert not connection.is_open

    run(last_words())


@pytest.mark.parametrize("nonsense", [b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1{"])
async def test_nonsense_ends_the_connection(pair: tuple[socket.socket, Peer], nonsense: bytes):
    sock, peer = pair
    connection = Connection(sock)
    asked = connection.request("x", {})
    peer.sock.sendall(nonsense)
    with pytest.raises(ConnectionLostError):
        await asked


async def test_descriptors_are_passed_on_and_never_kept(pair: tuple[socket.socket, Peer]):
    sock, peer = pair
    before = open_files()
    connection = Connection(sock)
    reader, writer = os.pipe()
    asked = connection.request("attach", {}, [writer])
    message = peer.receive()
    assert message["op"] == "attach"
    [theirs] = peer.channel.take_fds(1)
    os.write(theirs, b"through")
    os.close(theirs)
    assert os.read(reader, 100) == b"through"
    assert os.read(reader, 100) == b""  # nobody holds the other end any more
    os.close(reader)
    connection.close()
    with pytest.raises(ConnectionLostError):
        await asked
    dead = os.pipe()
    with pytest.raises(ConnectionLostError):
        await connection.request("attach", {}, dead)
    assert open_files() == before - 1  # the connection's own socket


async def test_a_request_that_is_too_large_fails_alone(pair: tuple[socket.socket, Peer]):
    sock, peer = pair
    connection = Connection(sock)
    with pytest.raises(InvalidArgument, match="too much"):
        await connection.request("exec", {"data": "x" * (5 << 20)}, [os.open("/dev/null", os.O_RDONLY)])
    asked = connection.request("next", {})
    assert peer.receive() == {"id": 2, "op": "next"}
    peer.answer({"id": 2, "ok": {}})
    assert await asked == {}
    connection.close()


async def test_a_peer_that_does_not_read_gets_everything_later(pair: tuple[socket.socket, Peer]):
    sock, peer = pair
    before = open_files()
    connection = Connection(sock)
    reader, writer = os.pipe()
    asked = [connection.request("big", {"n": n, "data": "x" * 100_000}) for n in range(20)]
    asked.append(connection.request("last", {}, [writer]))
    loop = asyncio.get_running_loop()

    def serve() -> None:
        for n in range(20):
            assert peer.receive()["n"] == n
        assert peer.receive()["op"] == "last"
        for fd in peer.channel.take_fds(1):
            os.close(fd)
        for number in range(1, 22):
            peer.answer({"id": number, "ok": {}})

    await loop.run_in_executor(None, serve)
    async with asyncio.timeout(10):
        assert await asyncio.gather(*asked) == [{}] * 21
    os.close(reader)
    connection.close()
    assert open_files() == before - 1
