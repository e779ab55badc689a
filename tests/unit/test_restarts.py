"""When a restart policy wants a container to run again, and how long it waits."""

import pytest

from corral.api.engine.v1.engine_pb2 import ContainerConfig, RestartPolicy
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine.options import check
from corral.engine.records import ContainerRecord, Status
from corral.engine.restarts import FIRST_PAUSE_S, LONGEST_PAUSE_S, is_cut_short, is_wanted, next_pause_s
from corral.rpc.errors import InvalidArgument

NO, ALWAYS = RestartPolicy.MODE_NO, RestartPolicy.MODE_ALWAYS
ON_FAILURE, UNLESS_STOPPED = RestartPolicy.MODE_ON_FAILURE, RestartPolicy.MODE_UNLESS_STOPPED


def ended(
    mode: int, code: int = 1, *, retries: int = 0, count: int = 0, stopped: bool = False, retrying: bool = False
) -> ContainerRecord:
    config = ContainerConfig(image="i", restart=RestartPolicy(mode=mode, max_retries=retries))  # type: ignore[arg-type]
    return ContainerRecord(
        "default", "id", "name", Status.EXITED, config, 1, started_ns=10**9, finished_ns=2 * 10**9,
        exit=ExitStatus(code=code, known=True), restart_count=count, stopped_by_user=stopped, retrying=retrying,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "now", "at_boot"),
    [
        (ended(NO), False, False),
        (ended(ALWAYS), True, True),
        (ended(ALWAYS, 0), True, True),
        (ended(ALWAYS, stopped=True), False, True),
        (ended(UNLESS_STOPPED, 0), True, True),
        (ended(UNLESS_STOPPED, stopped=True), False, False),
        (ended(ON_FAILURE), True, True),
        (ended(ON_FAILURE, 0), False, False),
        (ended(ON_FAILURE, stopped=True), False, False),
        (ended(ON_FAILURE, retries=2, count=1), True, True),
        (ended(ON_FAILURE, retries=2, count=2), False, False),
        (ended(ON_FAILURE, retries=2, count=2, retrying=True), True, True),
    ],
)
def test_a_policy_wants_what_docker_says_it_does(record: ContainerRecord, now: bool, at_boot: bool) -> None:
    assert is_wanted(record) is now
    assert is_wanted(record, at_boot=at_boot or record.config.restart.mode != ALWAYS) is at_boot


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (ended(ALWAYS, count=1, retrying=True), True),
        (ended(UNLESS_STOPPED, count=1, retrying=True, stopped=True), False),
        (ended(ON_FAILURE, retries=1, count=1, retrying=True), True),
        (ended(ALWAYS, count=1), False),  # a user's, or made again for one who attaches
        (ended(NO, count=1, retrying=True), False),  # its policy was taken away meanwhile
    ],
)
def test_one_that_was_made_again_is_started_if_its_policy_was_about_to(record: ContainerRecord, wanted: bool) -> None:
    created = record._replace(status=Status.CREATED, exit=None)
    assert is_cut_short(created) is (wanted or record.stopped_by_user)
    assert is_wanted(created, at_boot=True) is wanted


def test_the_pause_doubles_up_to_a_minute_and_is_short_again_after_a_good_run() -> None:
    record, pause_s, pauses = ended(ALWAYS), 0.0, []
    for _ in range(12):
        pause_s = next_pause_s(pause_s, record)
        pauses.append(pause_s)
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8]
    assert pauses[-1] == LONGEST_PAUSE_S
    long = record._replace(finished_ns=record.started_ns + 10 * 10**9)
    assert next_pause_s(pause_s, long) == FIRST_PAUSE_S


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"restart": RestartPolicy(mode=ALWAYS), "auto_remove": True}, "--rm"),
        ({"restart": RestartPolicy(mode=ALWAYS, max_retries=3)}, "on-failure"),
    ],
)
def test_what_makes_no_sense_is_refused(config: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        check(ContainerConfig(image="i", **config))  # type: ignore[arg-type]
