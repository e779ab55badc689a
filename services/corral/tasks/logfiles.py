"""Reading a log that somebody else appends to and rotates: name, name.1, name.2 …, the oldest last.

Open descriptors stay with a file whatever it is called, so what was opened is read to its end. Where to go on after
that is found by looking for the file that was read last among those that are there, the newest first. All this blocks.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from corral.tasks.entries import Entry, Parse, Selection

BLOCK = 256 << 10
# A line holds at most 16 KiB of output, which JSON may write six times as long.
MAX_LINE = 1 << 20


@dataclass(slots=True)
class _File:
    """One open file; `offset` is where its next unread line begins."""

    fd: int
    inode: tuple[int, int]
    offset: int = 0

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size


class LogFiles:
    """A position in a rotating log, from which it is read forwards. Close it."""

    def __init__(self, path: str, max_files: int, parse: Parse, selection: Selection) -> None:
        """Start at the first entry that is selected; nothing needs to be there yet."""
        self._path, self._max_files, self._parse, self._selection = path, max_files, parse, selection
        self._files: deque[_File] = deque()
        self._last: tuple[int, int] | None = None
        self._passed_over = 0
        """Entries of the next line that do not count."""
        self.is_past = False
        try:
            self._open_new()
            self._skip_old()
            if selection.tail is not None and self._files:
                self._go_to_tail(selection.tail)
        except BaseException:
            self.close()
            raise

    def read(self) -> tuple[list[Entry], bool]:
        """Some of the next entries; and whether these are all that there are now.

        Once an entry was later than `until`, is_past is set and there is nothing more to come.
        """
        while not self.is_past:
            if not self._files:
                self._open_new()
                if not self._files:
                    return [], True
            file = self._files[0]
            lines = self._next_lines(file)
            if lines:
                return self._selected(lines), False
            if not self._step():
                return [], True
        return [], True

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popleft().fd)

    def _step(self) -> bool:
        """The first file is read to its end: go on to the next one, if there is one."""
        if len(self._files) == 1:
            self._open_new()
            if len(self._files) == 1:
                return False
            # It was rotated away; what was appended before that, after we read it, comes first.
            if self._files[0].offset < self._files[0].size and _ends_line(self._files[0]):
                return True
        os.close(self._files.popleft().fd)
        return True

    def _open_new(self) -> None:
        """Open the files that are newer than the last one we know, and line them up."""
        found: list[_File] = []
        # From the newest on: a rotation meanwhile shows us a file twice rather than not at all.
        for number in range(self._max_files + 1):
            try:
                file = _open(f"{self._path}.{number}" if number else self._path)
            except FileNotFoundError:
                continue  # a rotation renames them one by one
            if file.inode == self._last:
                os.close(file.fd)
                break
            if any(file.inode == other.inode for other in found):
                os.close(file.fd)
                continue
            found.append(file)
        if found:
            self._last = found[0].inode
        self._files.extend(reversed(found))

    def _skip_old(self) -> None:
        """Pass over files that ended before `since`."""
        since_ns = self._selection.since_ns
        while since_ns is not None and len(self._files) > 1 and os.fstat(self._files[0].fd).st_mtime_ns < since_ns:
            os.close(self._files.popleft().fd)

    def _next_lines(self, file: _File) -> list[bytes]:
        """The next complete lines of a file, a block of them; none at its end."""
        if file.offset > file.size:  # with a single file, rotation means truncation
            file.offset = 0
        block = os.pread(file.fd, BLOCK, file.offset)
        end = block.rfind(b"\n") + 1
        if not end and len(block) == BLOCK:
            block = os.pread(file.fd, MAX_LINE, file.offset)
            end = block.find(b"\n") + 1
            if not end and len(block) == MAX_LINE:
                end = MAX_LINE  # no line of ours: passed over
        file.offset += end
        return block[:end].split(b"\n")[:-1]

    def _selected(self, lines: list[bytes]) -> list[Entry]:
        entries = []
        found = (entry for line in lines for entry in self._parse(line))
        passed_over, self._passed_over = self._passed_over, 0
        for entry in islice(found, passed_over, None):
            if self._selection.is_past(entry):
                self.is_past = True
                break
            if self._selection.has(entry):
                entries.append(entry)
        return entries

    def _go_to_tail(self, count: int) -> None:
        """Go to where the last `count` selected lines begin, pieces of one included."""
        found = self._tail_begins(count)
        last = len(self._files) - 1
        number, offset, self._passed_over = found or (last, _end_of_last_line(self._files[last]), 0)
        for _ in range(number):
            os.close(self._files.popleft().fd)
        self._files[0].offset = offset

    def _tail_begins(self, count: int) -> tuple[int, int, int] | None:
        """Which file's which line, and which entry of that; None: behind all that there is."""
        found, lines = None, 0
        for number, offset, line in self._backwards():
            entries = self._parse(line)
            for index in reversed(range(len(entries))):
                entry = entries[index]
                if self._selection.is_before(entry):
                    return found
                if not self._selection.has(entry):
                    continue
                if not entry.partial or found is None:  # the end of a line, or of one that is not complete yet
                    lines += 1
                if lines > count:
                    return found
                found = number, offset, index
        return found

    def _backwards(self) -> Iterator[tuple[int, int, bytes]]:
        """Every line there is, the newest first: in which file and where it begins."""
        for number in reversed(range(len(self._files))):
            file = self._files[number]
            for offset, line in _lines_backwards(file.fd, _end_of_last_line(file)):
                yield number, offset, line


def _open(name: str) -> _File:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    status = os.fstat(fd)
    return _File(fd, (status.st_dev, status.st_ino))


def _ends_line(file: _File) -> bool:
    return b"\n" in os.pread(file.fd, MAX_LINE, file.offset)


def _end_of_last_line(file: _File) -> int:
    end = file.size
    while end:
        start = max(0, end - BLOCK)
        newline = os.pread(file.fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _lines_backwards(fd: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines before `end`, which is behind a newline, the last one first, each with where it begins."""
    end -= 1 if end else 0
    rest = b""  # the end of a line whose beginning is in an earlier block
    while end > 0:
        start = max(0, end - BLOCK)
        lines = (os.pread(fd, end - start, start) + rest).split(b"\n")
        offset = end + len(rest)
        rest = lines.pop(0) if start else b""
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line
            offset -= 1
        end = start
