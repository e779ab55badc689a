"""Lines of a log, in the two formats that shims write.

    json-file   {"log":"text\\n","stream":"stdout","time":"2026-01-02T03:04:05.123456789Z"}
                {"log":"","data":"AAEC","stream":"stdout","time":"2026-01-02T03:04:05.123456789Z"}
    cri         2026-01-02T03:04:05.123456789Z stdout F text

Base64 in data is what is no text, perhaps several lines. A line without its newline (json-file) or with tag P
(cri) is a piece; the next entry of the stream goes on with it.
"""

import base64
import calendar
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

type StreamName = Literal["stdout", "stderr"]

_NS = 1_000_000_000
_NEWLINE_ENDED = re.compile(rb"[^\n]*\n|[^\n]+")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line, with its newline, or a piece of one, without."""

    time_ns: int
    stream: StreamName
    line: bytes

    @property
    def partial(self) -> bool:
        return not self.line.endswith(b"\n")


type Parse = Callable[[bytes], Sequence[Entry]]


def parse_json(line: bytes) -> Sequence[Entry]:
    """From a line of a json-file, without its newline; none if it is none (after a power loss there are such)."""
    try:
        fields = json.loads(line)
        text, stream, time = fields["log"], fields["stream"], fields["time"]
        if stream not in ("stdout", "stderr"):
            return ()
        at_ns = time_ns(time)
        if "data" in fields:
            data = base64.b64decode(fields["data"], validate=True)
            return [Entry(at_ns, stream, part) for part in _NEWLINE_ENDED.findall(data)]
        return (Entry(at_ns, stream, text.encode("utf-8", "surrogatepass")),)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()


def parse_cri(line: bytes) -> Sequence[Entry]:
    """From a line of a CRI log, without its newline; none if it is none."""
    try:
        time, stream, tag, text = line.split(b" ", 3)
        at_ns = time_ns(time.decode())
    except ValueError:
        return ()
    if tag[:1] != b"P":
        text += b"\n"
    match stream:
        case b"stdout":
            return (Entry(at_ns, "stdout", text),)
        case b"stderr":
            return (Entry(at_ns, "stderr", text),)
    return ()


PARSERS: Mapping[str, Parse] = MappingProxyType({"json-file": parse_json, "cri": parse_cri})


def time_ns(text: str) -> int:
    """RFC 3339 in UTC, with any number of decimals, as nanoseconds after 1970. Raises ValueError."""
    whole, _, rest = text.partition(".")
    decimals = rest.removesuffix("Z")
    nanoseconds = int(f"{decimals:0<9.9}") if decimals else 0
    return _seconds(whole.removesuffix("Z")) * _NS + nanoseconds


@lru_cache(64)
def _seconds(text: str) -> int:
    """Many lines share their second."""
    if len(text) != 19 or text[10] != "T":
        raise ValueError(f"{text!r} is not a time in UTC")
    numbers = [int(text[start:end]) for start, end in ((0, 4), (5, 7), (8, 10), (11, 13), (14, 16), (17, 19))]
    return calendar.timegm((*numbers, 0, 0, 0))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which entries are wanted. `tail` lines at the end of those, or all."""

    streams: frozenset[str]
    since_ns: int | None = None
    until_ns: int | None = None
    tail: int | None = None

    def has(self, entry: Entry) -> bool:
        """Whether it is wanted, but for tail."""
        return (
            entry.stream in self.streams
            and (self.since_ns is None or entry.time_ns >= self.since_ns)
            and not self.is_past(entry)
        )

    def is_past(self, entry: Entry) -> bool:
        """Whether it, and so what follows it, is too late."""
        return self.until_ns is not None and entry.time_ns > self.until_ns

    def is_over(self, now_ns: int) -> bool:
        """Whether nothing that is written from now on is wanted."""
        return self.until_ns is not None and now_ns > self.until_ns

    def is_before(self, entry: Entry) -> bool:
        """Whether it, and so what precedes it, is too early."""
        return self.since_ns is not None and entry.time_ns < self.since_ns
