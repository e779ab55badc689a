"""How far a long work is, from whoever does it to whoever shows it."""

from collections.abc import Callable
from enum import IntEnum


class Step(IntEnum):
    """Numbers as on the wire."""

    WAITING = 1
    TRANSFER = 2
    VERIFY = 3
    UNPACK = 4
    DONE = 5
    EXISTS = 6


# item, step, done_bytes, total_bytes (0: not known)
type Report = Callable[[str, Step, int, int], None]
