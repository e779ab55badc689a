"""What a client sends, and has read, goes on in the next call where it was in the last."""

import random

import pytest

from corral.api.tasks.v1 import tasks_pb2
from corral.cli.outbox import KEPT_BYTES, Outbox
from corral.client.following import LogPosition
from corral.rpc.errors import Unavailable

DETACH = tasks_pb2.AttachRequest(detach=tasks_pb2.Detach())


def stdin(data: bytes) -> tasks_pb2.AttachRequest:
    return tasks_pb2.AttachRequest(stdin=data)


def test_a_call_that_was_cut_short_is_followed_by_one_with_the_rest():
    box = Outbox()
    for data in (b"abc", b"defg", b"h"):
        box.put(stdin(data))
    call = box.requests()
    assert [next(call).stdin, next(call).stdin] == [b"abc", b"defg"]
    box.rewind(5)
    assert list(call) == []
    box.end()
    assert [request.stdin for request in box.requests()] == [b"fg", b"h"]


def test_no_byte_is_sent_twice_or_lost_however_often_it_is_cut_short():
    rng = random.Random(7)
    box, got, total = Outbox(), bytearray(), bytearray()
    for n in range(16):
        data = bytes([n]) * rng.randrange(1, 50)
        total += data
        box.put(stdin(data))
    box.end()
    while len(got) < len(total):
        call, sent = box.requests(), bytearray(got)
        for _ in range(rng.randrange(0, 4)):
            if (request := next(call, None)) is not None:
                sent += request.stdin
        got = sent[: rng.randrange(len(got), len(sent) + 1)]
        box.rewind(len(got))
    assert got == total


def test_what_was_typed_byte_by_byte_is_kept_as_a_few_messages():
    box, typed = Outbox(), bytes(range(256)) * 64
    call = box.requests()
    for n in range(len(typed)):
        box.put(stdin(typed[n : n + 1]))
        next(call)
    box.rewind(1)
    box.end()
    again = list(box.requests())
    assert b"".join(request.stdin for request in again) == typed[1:]
    assert len(again) <= 4


def test_a_detach_on_its_way_is_said_again():
    box = Outbox()
    box.put(stdin(b"x"))
    box.put(DETACH)
    call = box.requests()
    assert [next(call), next(call)] == [stdin(b"x"), DETACH]
    box.rewind(1)
    box.end()
    assert list(box.requests()) == [DETACH]


def test_what_is_not_kept_any_more_is_told_not_left_out():
    box = Outbox()
    call = box.requests()
    for _ in range(2):
        box.put(stdin(bytes(KEPT_BYTES)))
        next(call)
    box.put(stdin(b"x"))
    next(call)
    with pytest.raises(Unavailable, match="input was lost"):
        box.rewind(0)


def entry(second: int, line: bytes) -> tasks_pb2.LogEntry:
    made = tasks_pb2.LogEntry(line=line)
    made.time.seconds = second
    return made


def test_lines_of_one_moment_are_neither_missed_nor_read_twice():
    log = [entry(1, b"a"), entry(2, b"b"), entry(2, b"c"), entry(2, b"d"), entry(3, b"e")]
    position = LogPosition(tasks_pb2.LogsRequest(id="x", tail=4, follow=True))
    assert [e.line for e in position.new(log[1:3])] == [b"b", b"c"]
    rest = position.rest()
    assert (rest.since.seconds, rest.HasField("tail"), rest.follow) == (2, False, True)
    assert [e.line for e in position.new(log[1:4])] == [b"d"]
    assert position.rest().since.seconds == 2
    assert [e.line for e in position.new(log[1:])] == [b"e"]
