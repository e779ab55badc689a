"""What is done on the loop of the cgroups leaf, and what is not."""

import pytest

from corral.cgroups.prompt import LONG_S, REST_S, Prompt, WouldWaitError


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s

    def pass_(self, seconds: float) -> None:
        self.s += seconds


def test_a_kernel_that_is_slow_is_left_to_threads_for_a_while() -> None:
    clock = Clock()
    prompt = Prompt(clock)
    prompt.run(lambda: clock.pass_(LONG_S / 2))
    assert prompt.is_given()
    prompt.run(lambda: clock.pass_(LONG_S * 2))
    assert not prompt.is_given()
    clock.pass_(REST_S - 0.1)
    assert not prompt.is_given()
    clock.pass_(0.2)
    assert prompt.is_given()


def test_what_fails_slowly_counts_too() -> None:
    clock = Clock()
    prompt = Prompt(clock)

    def fail() -> None:
        clock.pass_(LONG_S * 2)
        raise WouldWaitError

    with pytest.raises(WouldWaitError):
        prompt.run(fail)
    assert not prompt.is_given()
