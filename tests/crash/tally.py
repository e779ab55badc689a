"""What the workers of a crash test saw, and what they would not forgive."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum


class Fault(StrEnum):
    """What must never be."""

    LOST = "lost"
    WRONG_CODE = "wrong exit code"
    MISSING = "output missing"
    TWICE = "output twice"
    MISTOLD = "told wrongly"


@dataclass(slots=True)
class Tally:
    """Counts, under one lock."""

    counts: Counter[str] = field(default_factory=Counter)
    """What was done, and what was told to be unknown as the design allows it."""
    faults: Counter[Fault] = field(default_factory=Counter)
    """In bytes where it is about output."""
    trace: bool = False
    """Tell of every kill."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def blame(self, fault: Fault, what: str, number: int = 1) -> None:
        print(f"{stamp()} {fault.upper()} {what}", flush=True)
        with self._lock:
            self.faults[fault] += number

    def note(self, what: str) -> None:
        if self.trace:
            print(f"{stamp()} {what}", flush=True)

    @property
    def is_clean(self) -> bool:
        return not self.faults.total()


def differences(expected: bytes, got: bytes) -> tuple[int, int]:
    """How many bytes, of lines, are missing, and how many are there twice or where they do not belong."""
    if expected == got:
        return 0, 0
    wanted, found = (Counter(data.splitlines(keepends=True)) for data in (expected, got))
    missing = sum(len(line) * number for line, number in (wanted - found).items())
    extra = sum(len(line) * number for line, number in (found - wanted).items())
    return (missing, extra) if missing or extra else (0, len(got))


def stamp() -> str:
    """As in the log of a daemon."""
    return datetime.now(UTC).strftime("%H:%M:%S.%f")
