"""Which failed calls are made again: those of which it is certain that nobody has begun to serve them."""

import itertools

import pytest

from corral.rpc.attempts import Attempts
from corral.rpc.errors import CONNECTION_ENDED, PAUSES_S, UNSERVED, NotFound, Unavailable

refused = Unavailable("moving", reason=UNSERVED)
ended = Unavailable("socket closed", reason="UNREACHABLE", metadata={"connection": CONNECTION_ENDED})
sent_away = Unavailable("went away", reason=UNSERVED, metadata={"connection": CONNECTION_ENDED})
nobody_there = Unavailable("connection refused", reason="UNREACHABLE")


def test_a_connection_that_ends_leaves_doubt_unless_its_server_has_refused_the_call_before() -> None:
    assert Attempts().pause_if_unserved_s(ended) is None
    attempts = Attempts()
    assert attempts.pause_s(refused) == PAUSES_S[0]
    assert attempts.pause_s(ended) == PAUSES_S[1]


@pytest.mark.parametrize("before", [[sent_away], [refused, ended]], ids=["told-so", "without-a-word"])
def test_once_the_server_that_refused_is_gone_the_end_of_a_connection_leaves_doubt(before: list[Unavailable]) -> None:
    """Who was connected to then may have begun the call."""
    attempts = Attempts()
    for error in before:
        attempts.pause_s(error)
    assert attempts.pause_if_unserved_s(ended) is None


@pytest.mark.parametrize("error", [nobody_there, NotFound("no such container"), Unavailable("", reason="CUT_OFF")])
def test_what_was_answered_or_reached_nobody_is_told(error: Exception) -> None:
    attempts = Attempts()
    attempts.pause_s(refused)
    with pytest.raises(type(error)) as caught:
        attempts.pause_s(error)
    assert caught.value is error


def test_after_the_last_pause_the_failure_is_told() -> None:
    attempts = Attempts()
    for _ in itertools.repeat(None, len(PAUSES_S)):
        attempts.pause_s(refused)
    with pytest.raises(Unavailable, match="moving"):
        attempts.pause_s(refused)
