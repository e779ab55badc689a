"""Pressure of one cgroup, on every layout that this host can show: told where it is measured, else refused by name."""

import errno
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cgroups import inside, layouts, parent, spin
from support.requirements import needs

from corral.kernel.cgroup import Cgroup, CpuLimits, PressureTrigger, PressureWatch, Resources, detect, open_driver

pytestmark = needs("root", "cgroup")

BUSY = PressureTrigger("cpu", stall_us=50_000, window_us=2_000_000)
WAIT_S = 20.0


LAYOUTS = layouts()
MEASURING = {name: layout for name, layout in LAYOUTS.items() if layout.unified}


@pytest.fixture(params=MEASURING)
def measured(request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    """A cgroup whose pressure is measured, and beside which there may be one more."""
    group = open_driver(MEASURING[request.param]).create(f"{parent()}-pressure/one")
    yield group
    beside(group).remove()
    group.remove()
    open_driver(MEASURING[request.param]).prune(f"{parent()}-pressure")


def beside(group: Cgroup) -> Cgroup:
    return open_driver(detect()).open(f"{group.path}-idle")


def reached(watch: PressureWatch, within_s: float) -> bool:
    return bool(select.select([watch], [], [], within_s)[0])


@needs("psi")
def test_who_waits_is_told_once_in_a_window_and_who_does_not_is_not(measured: Cgroup) -> None:
    measured.apply(Resources(cpu=CpuLimits(quota_us=10_000, period_us=100_000)))
    idle = open_driver(detect()).create(beside(measured).path)
    watch = measured.watch_pressure(BUSY)
    with inside(idle, lambda _: time.sleep(3600)), inside(measured, lambda _: spin(3600)):
        time.sleep(0.2)  # who begins to sleep may have waited for a CPU before
        other = idle.watch_pressure(BUSY)
        began = time.monotonic()
        for _ in range(2):
            assert reached(watch, WAIT_S)
            assert not watch.is_gone()
        assert time.monotonic() - began > 1.5  # the second is of another window
        assert not reached(other, 0)
    other.close()
    watch.close()


@needs("psi")
def test_a_cgroup_that_is_removed_is_no_pressure(measured: Cgroup) -> None:
    watch = measured.watch_pressure(BUSY)
    measured.remove()
    assert reached(watch, WAIT_S)
    assert watch.is_gone()
    watch.close()


@needs("psi")
@pytest.mark.parametrize(
    "trigger",
    [
        PressureTrigger("disk", 1, 2_000_000),
        PressureTrigger("cpu", 0, 2_000_000),
        PressureTrigger("cpu", 2_000_001, 2_000_000),
        PressureTrigger("cpu", 1, 12_000_000),
    ],
)
def test_a_trigger_that_can_not_be_is_refused_and_holds_nothing(measured: Cgroup, trigger: PressureTrigger) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted
    with pytest.raises(OSError, match="pressure of") as caught:
        measured.watch_pressure(trigger)
    assert caught.value.errno == errno.EINVAL
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - counted
    assert all(Path(path).exists() for path in measured.paths())


def test_a_host_without_cgroup_v2_says_so(measured: Cgroup) -> None:
    v1 = [each for each in detect().hierarchies if each.version == 1]
    with pytest.raises(OSError, match="measured in cgroup v2 alone, which this host has not mounted") as caught:
        Cgroup(measured.path, v1).watch_pressure(BUSY)
    assert caught.value.errno == errno.EOPNOTSUPP
