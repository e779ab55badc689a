"""Signals by name or number."""

import re
import signal

from corral.rpc.errors import InvalidArgument

_REALTIME = re.compile(r"RT(MIN|MAX)(?:([+-])(\d+))?")


def parse_signal(text: str) -> int:
    """ "TERM", "SIGTERM", "15", "RTMIN+3" as a number. Raises InvalidArgument."""
    word = text.strip().upper().removeprefix("SIG")
    number = int(word) if word.isascii() and word.isdigit() else _by_name(word)
    if number is None or not 1 <= number <= signal.SIGRTMAX:
        raise InvalidArgument(
            f"{text!r} is no signal: give a name such as SIGTERM, or a number from 1 to {signal.SIGRTMAX:d}",
            reason="BAD_SIGNAL",
        )
    return number


def _by_name(word: str) -> int | None:
    known = signal.Signals.__members__.get(f"SIG{word}")
    if known is not None:
        return int(known)
    match = _REALTIME.fullmatch(word)
    if match is None:
        return None
    base = int(signal.SIGRTMIN if match[1] == "MIN" else signal.SIGRTMAX)
    number = base + int(f"{match[2] or '+'}{match[3] or 0}")
    return number if signal.SIGRTMIN <= number <= signal.SIGRTMAX else None
