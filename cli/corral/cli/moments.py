"""Moments, exact to the nanosecond, in the words of docker's users."""

import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_SECONDS = re.compile(r"(?P<seconds>\d+)(\.(?P<fraction>\d{1,9})?)?")
_DATE = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)([T ](?P<time>\d\d:\d\d(:\d\d)?)([.,](?P<fraction>\d{1,9}))?)?"
    r"(?P<zone>[Zz]|[+-]\d\d:?\d\d)?"
)


def parse_moment(text: str) -> "Timestamp":
    """RFC 3339, in the local zone if it names none, seconds since 1970, or how long ago. Raises ValueError."""
    from google.protobuf.timestamp_pb2 import Timestamp

    when = Timestamp()
    try:
        when.FromNanoseconds(_nanoseconds(text))
    except (ValueError, OverflowError):
        raise ValueError(f"time {text!r} is not understood: give 2026-01-02T15:04:05Z, or how long ago: 10m") from None
    return when


def _nanoseconds(text: str) -> int:
    if found := _SECONDS.fullmatch(text):
        return int(found["seconds"]) * 10**9 + _fraction_ns(found["fraction"])
    if found := _DATE.fullmatch(text):
        from datetime import datetime

        whole = datetime.fromisoformat(f"{found['date']}T{found['time'] or '00:00'}{(found['zone'] or '').upper()}")
        return int(whole.astimezone().timestamp()) * 10**9 + _fraction_ns(found["fraction"])
    from corral.client.quantities import duration_s

    return time.time_ns() - round(duration_s(text) * 1e9)


def _fraction_ns(digits: str | None) -> int:
    return int((digits or "0").ljust(9, "0"))


def to_text(when: "Timestamp") -> str:
    """RFC 3339 in UTC, always with nine digits, so that columns of it are even."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(when.seconds))}.{when.nanos:09}Z"
