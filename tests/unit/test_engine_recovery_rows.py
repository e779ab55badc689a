"""Whether a container's row and its task say the same."""

import pytest

from corral.api.engine.v1.engine_pb2 import ContainerConfig
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1.types_pb2 import ExitStatus
from corral.engine.records import ContainerRecord, Status
from corral.engine.recovery import agree

ENDED_NS = 1_795_767_891_132_391_635


def task(ended_ns: int, *, started_ns: int, created_ns: int = ENDED_NS - 1) -> tasks_pb2.Task:
    found = tasks_pb2.Task(id="id", status=tasks_pb2.STATUS_STOPPED, exit=ExitStatus(code=3, known=True))
    found.created_at.FromNanoseconds(created_ns)
    found.started_at.FromNanoseconds(started_ns)
    found.exit.exited_at.FromNanoseconds(ended_ns)
    return found


def ended(finished_ns: int) -> ContainerRecord:
    return ContainerRecord(
        "default", "id", "name", Status.EXITED, ContainerConfig(), 1, started_ns=1, finished_ns=finished_ns
    )


@pytest.mark.parametrize("finished_ns", [ENDED_NS, int(float(ENDED_NS))])
def test_a_run_that_was_over_before_its_start_was_noted_is_no_further_one(finished_ns: int) -> None:
    """Journals tell times as doubles; and tasks notes a start when the shim has answered."""
    assert agree(ended(finished_ns), task(ENDED_NS, started_ns=ENDED_NS + 5_000_000))


def test_a_run_that_ended_later_is_a_further_one() -> None:
    later = task(ENDED_NS + 20_000_000, started_ns=ENDED_NS + 10_000_000, created_ns=ENDED_NS + 5_000_000)
    assert not agree(ended(ENDED_NS), later)


def test_a_start_that_failed_was_told_before_the_shim_told_of_its_end() -> None:
    assert agree(ended(ENDED_NS), task(ENDED_NS + 20_000_000, started_ns=0))
