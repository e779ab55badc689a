"""Moments as docker's users write and read them."""

import time
from collections.abc import Iterator

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from corral.cli.moments import parse_moment, to_text

NEW_YEAR_S = 1767225600  # 2026-01-01T00:00:00Z


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two hours east of Greenwich."""
    monkeypatch.setenv("TZ", "XXX-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1767225600", (0, 0)),
        ("1767225600.", (0, 0)),
        ("1767225600.134373121", (0, 134373121)),
        ("1767225600.5", (0, 500000000)),
        ("2026-01-01T00:00:00Z", (0, 0)),
        ("2026-01-01T00:00:00.134373121Z", (0, 134373121)),
        ("2026-01-01T01:30:00.5+01:30", (0, 500000000)),
        ("2026-01-01T02:00:00.134373121", (0, 134373121)),
        ("2026-01-01T02:00", (0, 0)),
        ("2026-01-01 02:00:01", (1, 0)),
        ("2026-01-01", (-7200, 0)),
        ("2026-01-01Z", (0, 0)),
    ],
)
@pytest.mark.usefixtures("zone")
def test_a_moment_is_exact_and_in_the_local_zone_where_it_names_none(text: str, expected: tuple[int, int]) -> None:
    when = parse_moment(text)
    assert (when.seconds - NEW_YEAR_S, when.nanos) == expected


@pytest.mark.parametrize(("text", "ago_s"), [("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("0s", 0), ("500ms", 0.5)])
def test_a_duration_is_how_long_ago(text: str, ago_s: float) -> None:
    before = time.time_ns()
    when = parse_moment(text).ToNanoseconds()
    assert before <= when + ago_s * 1e9 <= time.time_ns() + 1000


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2026-01-01T25:00", "inf", "nan", "", "9" * 30, "1.2.3"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        parse_moment(text)


@pytest.mark.parametrize("nanos", [0, 1, 120000000, 134373121])
def test_it_is_written_with_nine_digits(nanos: int) -> None:
    assert to_text(Timestamp(seconds=NEW_YEAR_S, nanos=nanos)) == f"2026-01-01T00:00:00.{nanos:09}Z"
