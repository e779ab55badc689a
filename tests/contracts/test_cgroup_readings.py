"""Readings of a cgroup again and again: what is looked at of one that does nothing, on every layout."""

from pathlib import Path

import pytest
from support.cgroups import inside, spin
from support.requirements import needs

from corral.cgroups.readings import Readings
from corral.kernel.cgroup import Cgroup, Driver, Stats

pytestmark = needs("root", "cgroup")

LONG_S = 60.0


def reader(driver: Driver, group: Cgroup) -> "Reader":
    return Reader(Readings(driver), group)


class Reader:
    """Reads one cgroup, as old as it may be."""

    def __init__(self, readings: Readings, group: Cgroup) -> None:
        self._readings, self._group = readings, group

    def read(self, max_age_s: float = LONG_S) -> Stats:
        [(_, _, stats)] = self._readings.read({self._group.path: self._group.path}, max_age_s)
        return stats


def test_one_that_does_nothing_has_the_very_same_reading_as_before(cgroup_driver: Driver, group: Cgroup) -> None:
    readings = reader(cgroup_driver, group)
    first = readings.read()
    assert all(readings.read() is first for _ in range(3))
    assert readings.read(1e-9) is first  # was read in full again


def test_one_that_has_run_is_read_anew(cgroup_driver: Driver, group: Cgroup) -> None:
    readings = reader(cgroup_driver, group)
    before = [readings.read() for _ in range(3)][-1]
    with inside(group, lambda _: spin(0.05)) as child:
        child.wait()
    after = readings.read()
    assert before.cpu is not None
    assert after.cpu is not None
    assert after.cpu.usage_ns > before.cpu.usage_ns


@needs("psi")
def test_who_did_not_run_waits_for_a_cpu_at_most_and_is_not_asked_what_else_for(
    cgroup_driver: Driver, group: Cgroup
) -> None:
    unified = cgroup_driver.layout.unified
    if unified is None or unified.controllers & {"cpu", "memory"}:
        pytest.skip("needs cgroup v1")
    readings = reader(cgroup_driver, group)
    calm = [readings.read() for _ in range(3)][-1]
    Path(f"{unified.mount_point}{group.path}").rmdir()  # the pressure files go
    now = readings.read()
    assert (now.cpu and now.cpu.pressure) is None
    assert (now.io_pressure, now.memory and now.memory.pressure) == (
        calm.io_pressure,
        calm.memory and calm.memory.pressure,
    )
    assert calm.io_pressure is not None
    assert readings.read(1e-9).io_pressure is None
