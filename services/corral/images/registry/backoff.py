"""When to ask again: back-off with jitter, and what Retry-After says."""

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from corral.images.registry.http import number

ATTEMPTS = 5
FIRST_S = 0.4
LONGEST_S = 20.0
# A registry that sends us away for longer is believed, and its answer handed on.
PATIENCE_S = 60.0


def delay_s(failures: int) -> float:
    """How long to wait after so many failures in a row: doubled each time, half of it by chance."""
    whole = min(FIRST_S * 2.0 ** (failures - 1), LONGEST_S)
    return float(whole) * random.uniform(0.5, 1.0)  # noqa: S311  # nobody guesses it


def retry_after_s(header: str | None) -> float | None:
    """Seconds from now; None where there is no such header, or none that can be read.

    Source: RFC 9110 section 10.2.3.
    """
    if (seconds := number(header)) is not None:
        return float(seconds)
    try:
        when = parsedate_to_datetime(header or "")
    except (ValueError, OverflowError):
        return None
    return max(((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds(), 0.0)
