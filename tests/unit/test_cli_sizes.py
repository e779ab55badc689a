"""Sizes as people read them: three digits and a unit."""

import pytest

from corral.cli.output import human_memory, human_size

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1kB"),
        (1_234_567, "1.23MB"),
        (999_499, "999kB"),
        (999_500, "1000kB"),
        (999_700, "1000kB"),
        (1_000_000, "1MB"),
        (5e18, "5000PB"),
    ],
)
def test_a_size_has_three_digits_and_never_an_exponent(size: float, shown: str) -> None:
    assert human_size(size) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (64 * MIB, "64MiB"),
        (999.4 * MIB, "999MiB"),
        (999.7 * MIB, "1000MiB"),
        (1023 * MIB, "1023MiB"),
        (1024 * MIB, "1GiB"),
        (2e15, "1819TiB"),
    ],
)
def test_memory_that_has_no_larger_unit_yet_may_have_four_digits(size: float, shown: str) -> None:
    assert human_memory(size) == shown
