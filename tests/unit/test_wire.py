"""The frames that daemon, zygote and shim speak."""

import array
import contextlib
import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.shim import wire
from corral.shim.wire import Channel, Decoder, ProtocolError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.dictionaries(st.text(), JSON_VALUES, max_size=5)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    a, b = (Channel(sock) for sock in socket.socketpair())
    b.sock.setblocking(False)
    with contextlib.closing(a), contextlib.closing(b):
        yield a, b


def open_fds() -> set[str]:
    return {link.name for link in Path("/proc/self/fd").iterdir() if link.exists()}


def framed(body: bytes) -> bytes:
    return wire.HEADER.pack(len(body)) + body


@given(st.lists(MESSAGES, max_size=6), st.randoms(use_true_random=False))
def test_messages_survive_any_cutting_of_the_stream(messages: list[wire.Message], cuts: random.Random) -> None:
    stream = b"".join(wire.encode(message) for message in messages)
    decoder, received, at = Decoder(), [], 0
    while at < len(stream):
        step = cuts.randint(1, 9)
        received += [message for message, _ in decoder.feed(stream[at : at + step])]
        at += step
    assert received == messages


@given(st.binary(max_size=200))
def test_noise_is_either_incomplete_or_refused_but_never_crashes(noise: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        for message, _ in Decoder().feed(noise):
            assert isinstance(message, dict)


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"null", b'"x"', b"{", b"\xff\xfe", b"{}{}", b"[" * 200_000],
    ids=["empty", "array", "null", "string", "cut", "binary", "two", "deep"],
)
def test_a_frame_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(Decoder().feed(framed(body)))


def test_an_oversized_frame_is_refused_by_its_header_alone() -> None:
    with pytest.raises(ProtocolError, match="larger"):
        list(Decoder().feed(wire.HEADER.pack(wire.MAX_FRAME + 1)))


def test_the_largest_frame_passes_and_one_byte_more_cannot_be_sent() -> None:
    overhead = len(json.dumps({"x": ""}, separators=(",", ":")))
    largest = {"x": "a" * (wire.MAX_FRAME - overhead)}
    ((message, _),) = Decoder().feed(wire.encode(largest))
    assert message == largest
    with pytest.raises(ProtocolError):
        wire.encode({"x": largest["x"] + "a"})


def test_a_descriptor_arrives_with_its_frame_and_is_the_same_file(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    reader, writer = os.pipe()
    a.send({"id": 1}, [writer])
    os.close(writer)
    for message in b.receive():
        assert message == {"id": 1}
        (received,) = b.take_fds(1)
    os.write(received, b"through")
    assert os.read(reader, 10) == b"through"
    assert not os.get_inheritable(received)
    os.close(received)
    os.close(reader)


def test_frames_without_descriptors_before_it_do_not_take_them(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    reader, writer = os.pipe()
    a.send({"id": 1})
    a.send({"id": 2})
    a.send({"id": 3}, [reader])
    seen = []
    with contextlib.suppress(BlockingIOError):
        while True:
            for message in b.receive():
                seen.append(message["id"])
                if message["id"] == 3:
                    os.close(b.take_fds(1)[0])
    assert seen == [1, 2, 3]
    os.close(reader)
    os.close(writer)


def test_descriptors_that_no_handler_takes_are_closed(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    reader, writer = os.pipe()
    before = open_fds()
    a.send({"id": 1}, [reader, writer])
    a.send({"id": 2})
    with contextlib.suppress(BlockingIOError):
        while True:
            list(b.receive())
    assert open_fds() == before
    os.close(reader)
    os.close(writer)


def test_a_frame_that_needs_more_descriptors_than_came_is_refused(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.send({"id": 1})
    for _ in b.receive():
        with pytest.raises(ProtocolError, match="needs 2"):
            b.take_fds(2)


@pytest.mark.parametrize("count", [wire.MAX_FDS + 1, 200])
def test_too_many_descriptors_are_refused_and_none_stays_open(pair: tuple[Channel, Channel], count: int) -> None:
    a, b = pair
    reader, writer = os.pipe()
    before = open_fds()
    fds = array.array("i", [reader] * count)
    a.sock.sendmsg([wire.encode({})], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    with pytest.raises(ProtocolError):
        list(b.receive())
    socket_fd = str(b.sock.fileno())
    b.close()
    assert open_fds() == before - {socket_fd}
    os.close(reader)
    os.close(writer)


def test_descriptors_of_an_unfinished_frame_are_closed_with_the_connection(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    reader, writer = os.pipe()
    before = open_fds()
    a.sock.sendmsg([b"\0\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reader]))])
    assert list(b.receive()) == []
    socket_fd = str(b.sock.fileno())
    b.close()
    assert open_fds() == before - {socket_fd}
    os.close(reader)
    os.close(writer)


def test_a_peer_that_hangs_up_is_eof_for_reader_and_writer(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.close()
    with pytest.raises(EOFError):
        list(b.receive())
    with pytest.raises(EOFError):
        b.send({"id": 1})


def test_what_the_socket_does_not_take_is_kept_and_flushed_in_order(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    messages = [{"id": n, "text": "x" * 50_000} for n in range(40)]
    for message in messages:
        b.send(message)
    assert b.unsent > 0
    received = list(a.receive())
    while len(received) < len(messages):
        b.flush()
        received += a.receive()
    assert received == messages
    assert b.flush()
    assert b.unsent == 0


def test_a_peer_that_never_reads_is_given_up_before_memory_is_gone(pair: tuple[Channel, Channel]) -> None:
    _, b = pair
    while b.unsent < wire.MAX_UNSENT - 1_100_000:
        b.send({"text": "x" * 1_000_000})
    with pytest.raises(EOFError, match="does not read"):
        b.send({"text": "x" * 2_000_000})
    assert b.unsent <= wire.MAX_UNSENT
