"""What is done on the loop of the cgroups leaf, and what is not."""

import time

import pytest

from corral.cgroups.prompt import LONG_S, REST_S, Prompt, WouldWaitError


class Kernel:
    """Takes as long as it is told to, and has its caller wait."""

    def __init__(self) -> None:
        self.now_s, self.waits = 100.0, 0
        self.prompt = Prompt(lambda: self.now_s, lambda: self.waits)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.waits += 1

    def work(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_kernel_that_has_one_wait_long_is_left_to_threads_for_a_while() -> None:
    kernel = Kernel()
    kernel.prompt.run(lambda: kernel.wait(LONG_S / 2))
    assert kernel.prompt.is_given()
    kernel.prompt.run(lambda: kernel.wait(LONG_S * 2))
    assert not kernel.prompt.is_given()
    kernel.work(REST_S - 0.1)
    assert not kernel.prompt.is_given()
    kernel.work(0.2)
    assert kernel.prompt.is_given()


def test_a_machine_that_is_busy_is_not_a_kernel_that_has_one_wait() -> None:
    kernel = Kernel()
    kernel.prompt.run(lambda: kernel.work(LONG_S * 2))
    assert kernel.prompt.is_given()


def test_what_fails_slowly_counts_too() -> None:
    kernel = Kernel()

    def fail() -> None:
        kernel.wait(LONG_S * 2)
        raise WouldWaitError

    with pytest.raises(WouldWaitError):
        kernel.prompt.run(fail)
    assert not kernel.prompt.is_given()


def test_to_sleep_is_to_wait() -> None:
    prompt = Prompt()
    prompt.run(lambda: time.sleep(LONG_S * 2))
    assert not prompt.is_given()
