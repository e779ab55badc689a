"""A container's log: its output cut into lines, framed, and appended to a file that rotates.

    json-file   {"log":"text\n","stream":"stdout","time":"2026-01-02T03:04:05.123456789Z"}
                {"log":"","data":"AAEC","stream":"stdout","time":"2026-01-02T03:04:05.123456789Z"}
    cri         2026-01-02T03:04:05.123456789Z stdout F text

The second form of json-file holds what is no text, for its NUL bytes or as it is no UTF-8: in Base64, lines or a piece
of one. As text it would be several times as large, take ten times as long and lose bytes. Much of it is cut without
regard to lines, into blocks.

A line longer than PIECE_LIMIT is written in pieces; only its last one ends the line (no "\n" in the log field, tag P).
Text without a newline waits, up to PIECE_LIMIT, until its line is complete or the stream ends.

Framing works on a whole read at once, not line by line: each step is one call into C.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from json.encoder import encode_basestring, encode_basestring_ascii
from pathlib import Path
from typing import Protocol

from corral.kernel import base64, vectors
from corral.kernel.failpoint import failpoint
from corral.shim.spool import STREAMS, Position, Spool, StreamName

type Format = Callable[[bytes, StreamName, str, bool], bytes]

PIECE_LIMIT = 16 << 10
LINES_LIMIT = 4 * PIECE_LIMIT
BLOCK_LIMIT = 8 * PIECE_LIMIT
_LONGEST_UTF8 = 4
_NEWLINE = 0x0A
_FEWEST_BYTES_A_LINE = 64  # of lines that are one entry: however much is kept, they are bounded
_MARK, _ESCAPED_MARK = "\x01", "\\u0001"
_SURROGATE = "\ud800"
_PLAIN = frozenset(range(0x20, 0x7F)) - frozenset(b'"\\') | frozenset(b"\n")
_ESCAPED_AS_NUL = bytes(byte if byte in _PLAIN else 0 for byte in range(256))


class Part(Enum):
    """What a group of bytes is."""

    LINES = 1
    PIECE = 2
    REST = 3
    BLOCK = 4


def cut(data: bytes, block_limit: int = 0) -> Iterator[tuple[Part, bytes]]:
    """Split bytes into groups of whole lines, at most LINES_LIMIT long, and pieces of overlong ones, PIECE_LIMIT.

    The last may be the REST: the shorter beginning of a line that is not complete yet. With a block_limit, what is no
    text, and enough for a piece, becomes blocks of at most as many bytes.
    """
    start, size = 0, len(data)
    while start < size:
        end = start + PIECE_LIMIT
        if block_limit and end <= size and _has_nul(data, start, end):
            block = data[start : _end_of_block(data, end, start + block_limit)]
            if not _has_many_lines(block):
                yield Part.BLOCK, block
                start += len(block)
                continue
        if (newline := data.rfind(b"\n", start, end)) >= 0:
            end = _end_of_lines(data, start, newline + 1, text=bool(block_limit))
            yield Part.LINES, data[start:end]
        elif end <= size:
            end = _before_split_character(data, start, end)
            yield Part.PIECE, data[start:end]
        else:
            yield Part.REST, data[start:]
            return
        start = end


def _has_nul(data: bytes, start: int, end: int) -> bool:
    return data.find(b"\0", start, end) >= 0


def _end_of_block(data: bytes, end: int, limit: int) -> int:
    """Where what is no text ends, looked at piece by piece, if the first piece ends at `end`."""
    while end < limit and _has_nul(data, end, min(end + PIECE_LIMIT, limit)):
        end += PIECE_LIMIT
    return min(end, limit)


def _has_many_lines(data: bytes) -> bool:
    return vectors.count(data, _NEWLINE) > len(data) // _FEWEST_BYTES_A_LINE


def _end_of_lines(data: bytes, start: int, end: int, *, text: bool) -> int:
    """Where as many lines end as one group has, if the first of them end at `end`. text: NUL bytes are none of it."""
    while (next_end := data.rfind(b"\n", end, min(end + PIECE_LIMIT, start + LINES_LIMIT)) + 1) > end:
        if text and _has_nul(data, end, next_end):
            break
        end = next_end
    return end


def _before_split_character(data: bytes, start: int, end: int) -> int:
    """Step back from `end` so that no UTF-8 sequence is torn; bytes that are not UTF-8 are cut where asked."""
    for back in range(1, min(_LONGEST_UTF8, end - start)):
        byte = data[end - back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return end - back if length > back else end
    return end


def json_lines(group: bytes, stream: StreamName, timestamp: str, whole: bool, *, attrs: str = "") -> bytes:
    """Docker's json-file framing of whole lines, or of one piece of a line; of what is no text, our own.

    attrs: a member, and the comma before it, that each line has.
    """
    tail = f',"stream":"{stream}"{attrs},"time":"{timestamp}"}}\n'
    if b"\0" in group and not (whole and _has_many_lines(group)):
        return _no_text(group, tail)
    try:
        return _text(group, tail, whole)
    except UnicodeDecodeError:
        if not whole:
            return _no_text(group, tail)
        return b"".join(_line(line + b"\n", tail) for line in group[:-1].split(b"\n"))


def _no_text(group: bytes, tail: str) -> bytes:
    return b"".join((b'{"log":"","data":"', *base64.encoded(group), f'"{tail}'.encode()))


def _line(line: bytes, tail: str) -> bytes:
    try:
        return _text(line, tail, True)
    except UnicodeDecodeError:
        return _no_text(line, tail)


def _text(group: bytes, tail: str, whole: bool) -> bytes:
    if not whole:
        return f'{{"log":{encode_basestring(group.decode())}{tail}'.encode()
    seam = f'\\n"{tail}{{"log":"'
    if b"\0" not in group.translate(_ESCAPED_AS_NUL):
        lines = group[:-1].replace(b"\n", seam.encode())
    else:
        lines = _escape_lines(group[:-1].decode(), seam).encode()
    return b'{"log":"' + lines + f'\\n"{tail}'.encode()


def _escape_lines(text: str, seam: str) -> str:
    """Lines escaped for JSON, without quotes, and joined by seam.

    An escaped newline can't be told from an escaped backslash that an n follows. So newlines first become a mark that
    the text does not contain, and whose escaped form it can't result in either.
    """
    if text.isascii() and _MARK not in text and _ESCAPED_MARK not in text:
        return encode_basestring_ascii(text.replace("\n", _MARK))[1:-1].replace(_ESCAPED_MARK, seam)
    # Decoded text has no surrogates, and this function, the slower one by far, leaves them as they are.
    return encode_basestring(text.replace("\n", _SURROGATE))[1:-1].replace(_SURROGATE, seam)


def cri_lines(group: bytes, stream: StreamName, timestamp: str, whole: bool) -> bytes:
    """Kubernetes' CRI framing of whole lines, or of one piece of a line."""
    if not whole:
        return f"{timestamp} {stream} P ".encode() + group + b"\n"
    prefix = f"{timestamp} {stream} F ".encode()
    return prefix + group[:-1].replace(b"\n", b"\n" + prefix) + b"\n"


def cri_last(rest: bytes, stream: StreamName, timestamp: str, _whole: bool) -> bytes:
    """CRI's framing of text that the stream ended without a newline: no more follows, so it is full."""
    return cri_lines(rest + b"\n", stream, timestamp, True)


FORMATS: dict[str, tuple[Format, Format]] = {"json-file": (json_lines, json_lines), "cri": (cri_lines, cri_last)}


def timestamp(time_ns: int) -> str:
    """RFC 3339 with nanoseconds, in UTC."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z"


class LogFile:
    """An append-only file that rotates by size: name, name.1, name.2 …, `max_files` of them in all.

    After it was opened nothing raises and nothing blocks: what the disk does not take is refused.
    """

    __slots__ = ("_fd", "_inode", "_max_files", "_max_size", "_path", "_size")

    def __init__(self, path: str, *, max_size: int, max_files: int) -> None:
        """A max_size of 0 is no limit. Raises OSError if the file cannot be opened."""
        self._path, self._max_size, self._max_files = path, max_size, max(1, max_files)
        self._fd, self._inode, self._size = _open(path)

    @property
    def position(self) -> Position:
        """Which file the next append goes to, and how large that is."""
        return self._inode, self._size

    def holds(self, size: int) -> bool:
        """Whether one file may be as large."""
        return not self._max_size or size <= self._max_size

    def make_room(self, size: int) -> None:
        """Rotate, if as many bytes more would be too much for one file."""
        if self._max_size and self._size and self._size + size > self._max_size:
            self._rotate()

    def append(self, data: bytes) -> bool:
        """Write all of data, or nothing of it and return False."""
        self.make_room(len(data))
        written = 0
        try:
            failpoint("shim.log.write")
            written = os.write(self._fd, data)
        except OSError:
            return False
        if written == len(data):
            failpoint("shim.log.written")
            self._size += written
            return True
        return self._finish_or_undo(data, written)

    def undo_torn(self, before: Position, size: int) -> bool:
        """Cut off what was appended since `before`, if it is less than `size` bytes; whether it was, and is gone.

        A write(2) that a SIGKILL interrupts has written some pages of its data.
        """
        inode, kept = before
        if inode != self._inode or self._size >= kept + size:
            return False
        try:
            os.ftruncate(self._fd, kept)
        except OSError:
            return False
        self._size = kept
        return True

    def reopen(self) -> None:
        """Follow the name after somebody renamed the file. Raises OSError and keeps the old file if that fails."""
        fd, inode, size = _open(self._path)
        os.close(self._fd)
        self._fd, self._inode, self._size = fd, inode, size

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _finish_or_undo(self, data: bytes, written: int) -> bool:
        """A short write: a disk that is filling up. Half a line must not stay."""
        try:
            if os.write(self._fd, data[written:]) == len(data) - written:
                self._size += len(data)
                return True
        except OSError:
            pass
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
        except OSError:
            self._size += written
        return False

    def _rotate(self) -> None:
        """Shift the files by one; a step that fails leaves the log where it is, to be tried again."""
        failpoint("shim.log.rotate")
        try:
            if self._max_files == 1:
                os.ftruncate(self._fd, 0)
                self._size = 0
                return
            for n in range(self._max_files - 1, 0, -1):
                source = f"{self._path}.{n - 1}" if n > 1 else self._path
                if os.path.lexists(source):
                    _move(source, f"{self._path}.{n}")
            self.reopen()
        except OSError:
            return


def _move(source: str, target: str) -> None:
    """Rename a file; one that is there already goes first: ext4 writes out what a rename replaces another file by."""
    Path(target).unlink(missing_ok=True)
    Path(source).rename(target)


def _open(path: str) -> tuple[int, int, int]:
    # O_NONBLOCK: should the name be a FIFO or a device, a stuck reader must not block the container.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags, 0o640)
    status = os.fstat(fd)
    return fd, status.st_ino, status.st_size


class Log(Protocol):
    """Where a container's output is kept."""

    @property
    def dropped_bytes(self) -> int:
        """Of the container's, that are not in it."""

    def take(self, stream: StreamName, fd: int, size: int, *, pipe: bool) -> bytes:
        """Read from a pipe or a terminal what is to be written next. Raises as os.read() does."""

    def write(self, stream: StreamName, data: bytes) -> None:
        """Take bytes as the container wrote them, cut anywhere."""

    def end(self, stream: StreamName) -> None:
        """The stream ended: write what waits for a newline."""

    def delivered(self, stuck_s: float) -> bool:
        """Whether all is written, or what is not won't be: nothing was taken for that many seconds."""

    def streams(self) -> Mapping[str, int]:
        """What the shim after this one can't open again, by stream; the fds stay this one's."""

    def reopen(self) -> None:
        """Open the file again by its name. Raises OSError."""

    def close(self) -> None:
        """Write what waits and close."""


@dataclass(slots=True)
class NoLog:
    """Keeps nothing."""

    dropped_bytes: int = 0

    def take(self, stream: StreamName, fd: int, size: int, *, pipe: bool) -> bytes:
        """Read it."""
        return os.read(fd, size)

    def write(self, stream: StreamName, data: bytes) -> None:
        """Forget it."""

    def end(self, stream: StreamName) -> None:
        """Nothing waits."""

    def delivered(self, stuck_s: float) -> bool:
        """Nothing waits."""
        return True

    def streams(self) -> Mapping[str, int]:
        """None."""
        return {}

    def reopen(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""


class FileLog:
    """A log in lines of one format. `dropped_bytes` counts the container's bytes that the disk did not take."""

    __slots__ = ("_block_limit", "_file", "_format", "_format_last", "_spool", "_waiting", "dropped_bytes")

    def __init__(
        self,
        file: LogFile,
        driver: str,
        spool: Spool | None = None,
        *,
        attrs: Mapping[str, str] | None = None,
        blocks: bool = True,
    ) -> None:
        """spool: where what is taken is kept until it is written; what an earlier shim left there is written first.

        attrs: told with each line, by a format that can. blocks: whether what is no text may be cut within lines.
        """
        self._file, self._spool = file, spool
        self._format, self._format_last = FORMATS[driver]
        self._block_limit = 0
        if driver == "json-file" and blocks:
            self._block_limit = BLOCK_LIMIT if file.holds(2 * BLOCK_LIMIT) else PIECE_LIMIT
        if attrs and driver == "json-file":
            text = f',"attrs":{json.dumps(attrs, separators=(",", ":"))}'
            self._format = self._format_last = partial(json_lines, attrs=text)
        self._waiting: dict[StreamName, bytes] = {}
        self.dropped_bytes = 0
        if spool is not None:
            self._go_on(spool)
            spool.begin(STREAMS[0], file.position)

    def take(self, stream: StreamName, fd: int, size: int, *, pipe: bool) -> bytes:
        """Read what is to be written next; should this process be killed before it is, it is not lost."""
        return os.read(fd, size) if self._spool is None else self._spool.take(stream, fd, size, pipe=pipe)

    def write(self, stream: StreamName, data: bytes) -> None:
        """Append the lines that are complete now, with the present time."""
        waiting = self._waiting.pop(stream, b"")
        now = timestamp(time.time_ns())
        for part, group in cut(waiting + data, self._block_limit):
            if part is Part.REST:
                self._waiting[stream] = group
            else:
                for lines, frame in self._framed(group, stream, now, part is Part.LINES):
                    self._append(stream, len(lines), frame)
        if self._spool is not None:
            self._spool.tidy(stream)

    def end(self, stream: StreamName) -> None:
        """Append the rest of a line that will not be completed."""
        rest = self._waiting.pop(stream, b"")
        if rest:
            self._append(stream, len(rest), self._format_last(rest, stream, timestamp(time.time_ns()), False))

    def delivered(self, stuck_s: float) -> bool:
        """It is written at once."""
        return True

    def streams(self) -> Mapping[str, int]:
        """None: a file can be opened again."""
        return {}

    def reopen(self) -> None:
        """Open the file again by its name, as after a rotation by somebody else. Raises OSError."""
        self._file.reopen()

    def close(self) -> None:
        """Append what waits and close the file."""
        for stream in tuple(self._waiting):
            self.end(stream)
        self._file.close()
        if self._spool is not None:
            self._spool.close()

    def _framed(self, group: bytes, stream: StreamName, now: str, whole: bool) -> Iterator[tuple[bytes, bytes]]:
        """The group with its frame; if that is more than a file may hold, by parts of its lines."""
        frame = self._format(group, stream, now, whole)
        middle = group.rfind(b"\n", 0, len(group) // 2) + 1 or group.find(b"\n") + 1
        if self._file.holds(len(frame)) or not whole or middle == len(group):
            yield group, frame
            return
        yield from self._framed(group[:middle], stream, now, True)
        yield from self._framed(group[middle:], stream, now, True)

    def _append(self, stream: StreamName, size: int, frame: bytes) -> None:
        self._file.make_room(len(frame))
        if self._spool is not None:
            self._spool.begin(stream, self._file.position)
        if not self._file.append(frame):
            self.dropped_bytes += size
        if self._spool is not None:
            self._spool.logged(stream, size, self._file.position)

    def _go_on(self, spool: Spool) -> None:
        """Write what the shim before had taken and not written."""
        left = {stream: spool.unlogged(stream) for stream in STREAMS}
        logged = spool.perhaps_logged(self._file.position)
        if logged is not None and spool.marked is not None and left[logged]:
            part, group = next(cut(left[logged], self._block_limit))
            then = timestamp(0)  # a frame is as long as with any other time
            if part is Part.REST:
                frame = self._format_last(group, logged, then, False)
            else:
                group, frame = next(self._framed(group, logged, then, part is Part.LINES))
            if not self._file.undo_torn(spool.marked, len(frame)):
                spool.logged(logged, len(group), self._file.position)
                left[logged] = left[logged][len(group) :]
        for stream, data in left.items():
            if data:
                self.write(stream, data)
