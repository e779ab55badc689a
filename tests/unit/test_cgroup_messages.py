"""Readings as messages, some of which are known already."""

from corral.cgroups.messages import MOST, Messages
from corral.cgroups.store import Key
from corral.kernel.cgroup import PidsStats, Stats

WEB = Key("default", "web")


def test_a_reading_that_is_the_same_as_before_has_the_time_of_now() -> None:
    messages, stats = Messages(), Stats(pids=PidsStats(3))
    for read_ns in (1, 2_000_000_003):
        [message] = messages.response([(WEB, read_ns, stats)]).stats
        assert (message.id, message.pids.current) == ("web", 3)
        assert message.read_at.ToNanoseconds() == read_ns


def test_one_that_has_changed_is_told_as_it_is_and_so_is_one_of_the_same_name_elsewhere() -> None:
    messages = Messages()
    messages.response([(WEB, 1, Stats(pids=PidsStats(3)))])
    answer = messages.response([(WEB, 1, Stats(pids=PidsStats(4))), (Key("other", "web"), 1, Stats())])
    assert [(message.id, message.pids.current) for message in answer.stats] == [("web", 4), ("web", 0)]


def test_more_than_are_kept_are_told_all() -> None:
    messages = Messages()
    readings = [(Key("default", f"c{number}"), 1, Stats(pids=PidsStats(number))) for number in range(MOST + 2)]
    for _ in range(2):
        answer = messages.response(readings)
        assert [message.pids.current for message in answer.stats] == list(range(MOST + 2))
