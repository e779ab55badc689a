"""What a health check is, and what its results come to."""

import pytest
from google.protobuf.duration_pb2 import Duration

from corral.api.engine.v1.engine_pb2 import Health
from corral.api.images.v1.images_pb2 import Healthcheck
from corral.engine.health_rules import Probe, Rules, Verdict, check_healthcheck, resolved
from corral.rpc.errors import InvalidArgument

STARTING, HEALTHY, UNHEALTHY = Health.STATE_STARTING, Health.STATE_HEALTHY, Health.STATE_UNHEALTHY


def rules(**fields: object) -> Rules:
    found = Rules.of(Healthcheck(test=["CMD", "true"], **fields))  # type: ignore[arg-type]
    assert found is not None
    return found


def states(codes: list[int], at: Rules, since_start_s: float = 100.0) -> list[int]:
    verdict, found = Verdict(), []
    for code in codes:
        verdict = verdict.after(Probe(0, 1, code, ""), at, since_start_s=since_start_s)
        found.append(verdict.state)
    return found


def test_one_success_makes_it_healthy_and_so_many_failures_in_a_row_unhealthy() -> None:
    assert states([1, 1, 0, 1, 1, 0, 1, 1, 1, 0], rules()) == [
        *(STARTING, STARTING, HEALTHY, HEALTHY, HEALTHY, HEALTHY, HEALTHY, HEALTHY, UNHEALTHY, HEALTHY),
    ]
    assert states([1], rules(retries=1)) == [UNHEALTHY]


def test_failures_of_the_start_period_do_not_count_before_the_first_success() -> None:
    slow = rules(start_period=Duration(seconds=60))
    assert states([1] * 5, slow, since_start_s=59) == [STARTING] * 5
    assert states([0, 1, 1, 1], slow, since_start_s=1) == [HEALTHY, HEALTHY, HEALTHY, UNHEALTHY]


def test_the_last_five_results_are_kept() -> None:
    verdict = Verdict()
    for number in range(7):
        verdict = verdict.after(Probe(number, number + 1, number % 2, str(number)), rules(), since_start_s=100)
    told = verdict.to_wire()
    assert [(one.output, one.exit_code) for one in told.log] == [("2", 0), ("3", 1), ("4", 0), ("5", 1), ("6", 0)]
    assert told.last_output == "6"
    assert (told.log[0].started_at.ToNanoseconds(), told.log[0].ended_at.ToNanoseconds()) == (2, 3)


def test_what_is_left_out_is_as_in_the_image_then_as_docker_has_it() -> None:
    image = Healthcheck(test=["CMD-SHELL", "probe"], interval=Duration(seconds=7), retries=9)
    merged = Rules.of(resolved(Healthcheck(timeout=Duration(seconds=2)), image))
    assert merged is not None
    assert (merged.args, merged.interval_s, merged.timeout_s) == (("/bin/sh", "-c", "probe"), 7, 2)
    assert (merged.retries, merged.start_interval_s) == (9, 5)
    replaced = resolved(Healthcheck(test=["CMD", "other"]), image)
    assert (list(replaced.test), replaced.retries) == (["CMD", "other"], 9)


def test_an_image_may_not_ask_for_probes_without_a_pause() -> None:
    nothing = Duration(nanos=1)
    hostile = Healthcheck(test=["CMD", "probe"], interval=nothing, start_interval=nothing)
    found = Rules.of(resolved(Healthcheck(), hostile))
    assert found is not None
    assert (found.interval_s, found.start_interval_s) == (1, 1)
    asked = Rules.of(resolved(Healthcheck(interval=Duration(nanos=50_000_000)), hostile))
    assert asked is not None
    assert (asked.interval_s, asked.start_interval_s) == (0.05, 1)
    assert not resolved(Healthcheck(), Healthcheck(test=["CMD", "x"])).HasField("interval")


def test_it_can_be_switched_off_and_an_image_that_talks_nonsense_has_none() -> None:
    image = Healthcheck(test=["CMD", "probe"])
    assert Rules.of(resolved(Healthcheck(test=["NONE"]), image)) is None
    assert Rules.of(resolved(Healthcheck(), Healthcheck(test=["PROBE", "x"]))) is None
    assert Rules.of(resolved(Healthcheck(), Healthcheck(test=["CMD", "x"], interval=Duration(seconds=-1)))) is None
    assert Rules.of(resolved(Healthcheck(), Healthcheck())) is None


@pytest.mark.parametrize(
    "check",
    [
        Healthcheck(test=["curl", "-f"]),
        Healthcheck(test=["CMD"]),
        Healthcheck(test=["CMD", ""]),
        Healthcheck(test=["CMD-SHELL", "a", "b"]),
        Healthcheck(test=["CMD", "a\0b"]),
        Healthcheck(test=["CMD", "a"], interval=Duration(seconds=-1)),
        Healthcheck(test=["CMD", "a"], timeout=Duration(seconds=2**62, nanos=2**31 - 1)),
    ],
)
def test_what_is_no_health_check_is_refused_in_a_sentence(check: Healthcheck) -> None:
    with pytest.raises(InvalidArgument, match="health check: "):
        check_healthcheck(check)
