"""Output on its way into the log, kept where the next shim finds it should this one be killed.

    process --> FIFO --splice(2)--> stdout.spool --> log file
                                         |
    spool.mark: the log's inode and size after what was appended last, and how far each spool is in the log by then;
                and how far each was copied elsewhere, if the log is one that sends and keeps a copy

A byte leaves the FIFO and enters the spool in one system call, and every append is followed by a new mark. So what lies
behind the mark was taken and is not in the log; all but the first group of it perhaps, which is if the log has grown by
as much. The first mark is written before anything is taken: without one, spools are none.
What comes from a terminal, which splice(2) does not read, is in the spool only after it was read.

    stdout.spool    where its second byte counts from, 8 bytes, then the stream from there on
"""

import contextlib
import errno
import os
import struct
from typing import Literal

from corral.kernel.failpoint import failpoint

type StreamName = Literal["stdout", "stderr"]

STREAMS: tuple[StreamName, StreamName] = ("stdout", "stderr")
MARK = "spool.mark"
KEPT, MUCH = 64 << 10, 1 << 20
"""From how much in the log a spool is emptied; and replaced by what is not in it yet, which costs more."""
_BASE = struct.Struct("=Q")
_MARK = struct.Struct("=7Q")
_OLD_MARK = struct.Struct("=5Q")
_MODE = 0o600

type Position = tuple[int, int]
"""Inode and size of a log file."""


class Spool:
    """The spools of one container's streams. Where the disk takes nothing more it is given up, and output goes on."""

    __slots__ = ("_bases", "_copied", "_current", "_directory", "_ends", "_fds", "_mark", "_marked", "_starts", "kept")

    def __init__(self, directory: int) -> None:
        """directory: an fd of the bundle, which may hold the spools of the shim before. Raises OSError."""
        self._directory = directory
        self._fds = dict.fromkeys(STREAMS, -1)
        self._bases, self._ends, self._starts, self._copied = (dict.fromkeys(STREAMS, 0) for _ in range(4))
        self._current = STREAMS[0]
        self._marked: Position | None = None
        self._mark = os.open(MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE, dir_fd=directory)
        self.kept = True
        if len(mark := os.pread(self._mark, _MARK.size, 0)) >= _OLD_MARK.size:
            self._restore(mark.ljust(_MARK.size, b"\0"))

    def _restore(self, mark: bytes) -> None:
        inode, size, *starts, current, copied, copied_too = _MARK.unpack(mark)
        self._copied = dict(zip(STREAMS, (copied, copied_too), strict=True))
        self._marked, self._current = (inode, size), STREAMS[current]
        for stream, start in zip(STREAMS, starts, strict=True):
            self._starts[stream] = self._bases[stream] = self._ends[stream] = start
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(_file(stream), os.O_RDWR | os.O_CLOEXEC, dir_fd=self._directory)
                if len(head := os.pread(fd, _BASE.size, 0)) < _BASE.size:  # killed while it made the file
                    os.close(fd)
                    continue
                self._fds[stream] = fd
                (base,) = _BASE.unpack(head)
                end = base + os.fstat(fd).st_size - _BASE.size
                if end < start:
                    self._empty(stream)
                else:
                    self._bases[stream], self._ends[stream] = base, end

    def unlogged(self, stream: StreamName) -> bytes:
        """What was taken from a stream and is not in the log, as far as the mark tells."""
        start, end = self._starts[stream], self._ends[stream]
        return os.pread(self._fds[stream], end - start, self._place(stream, start)) if end > start else b""

    def copied(self, stream: StreamName) -> None:
        """All that was taken from the stream is copied."""
        self._copied[stream] = self._ends[stream]
        if self.kept and self._marked is not None:
            self._write_mark()

    def copied_of_unlogged(self, stream: StreamName) -> int:
        """How many bytes of unlogged() are copied, as far as the mark tells."""
        return max(0, self._copied[stream] - self._starts[stream])

    @property
    def marked(self) -> Position | None:
        """Where the log ended when the last mark was written; None if none was."""
        return self._marked

    def perhaps_logged(self, log: Position) -> StreamName | None:
        """The stream whose first group was appended after the last mark, if the log is at `log` now."""
        if self._marked is None:
            return None
        inode, size = self._marked
        return self._current if log[1] > (size if log[0] == inode else 0) else None

    def take(self, stream: StreamName, fd: int, size: int, *, pipe: bool) -> bytes:
        """One read of at most `size` bytes, empty at the end of the stream. Raises BlockingIOError, OSError of fd's."""
        if not self.kept:
            return os.read(fd, size)
        if not pipe:
            data = os.read(fd, size)
            self._keep(stream, data)
            return data
        try:
            spool, end = self._opened(stream), self._ends[stream]
            taken = os.splice(fd, spool, size, offset_dst=self._place(stream, end), flags=os.SPLICE_F_NONBLOCK)
            if not taken:
                return b""
            failpoint("shim.log.taken")
            self._ends[stream] = end + taken
            return os.pread(spool, taken, self._place(stream, end))
        except BlockingIOError:
            raise
        except OSError:
            self.give_up()
            return os.read(fd, size)

    def begin(self, stream: StreamName, log: Position) -> None:
        """Say before something of a stream is appended where the log ends; costs nothing if that is known."""
        if self.kept and (self._marked != log or self._current != stream):
            self._current, self._marked = stream, log
            self._write_mark()

    def logged(self, stream: StreamName, size: int, log: Position) -> None:
        """So many bytes more of the stream are in the log, which ends there now, or were dropped."""
        if self.kept:
            self._starts[stream] += size
            self._current, self._marked = stream, log
            self._write_mark()

    def tidy(self, stream: StreamName) -> None:
        """Let go of what is in the log, if it is much."""
        start, end = self._starts[stream], self._ends[stream]
        if not self.kept or start - self._bases[stream] < KEPT:
            return
        if start == end:
            self._empty(stream)
        # What waits is copied each time: it must be less than what goes, however much it is.
        elif start - self._bases[stream] >= max(MUCH, end - start):
            self._copy_rest(stream)

    def _empty(self, stream: StreamName) -> None:
        """All is in the log. A spool that ends before what is logged does was cut, and not told yet where it begins."""
        fd, start = self._fds[stream], self._starts[stream]
        try:
            os.ftruncate(fd, _BASE.size)
            failpoint("shim.log.emptied")
            os.pwrite(fd, _BASE.pack(start), 0)
        except OSError:
            self.give_up()
        self._bases[stream] = start

    def _copy_rest(self, stream: StreamName) -> None:
        start = self._starts[stream]
        content, name = _BASE.pack(start) + self.unlogged(stream), _file(stream)
        try:
            fd = os.open(
                f"{name}.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE, dir_fd=self._directory
            )
            old, self._fds[stream] = self._fds[stream], fd
            os.close(old)
            self._bases[stream] = start
            if os.pwrite(fd, content, 0) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            os.rename(f"{name}.new", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        """Keep nothing from here on; what was kept is no longer to be found."""
        if not self.kept:
            return
        self.kept = False
        self.close()
        for name in (MARK, *map(_file, STREAMS)):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory)

    def close(self) -> None:
        """Close the files; harmless when repeated."""
        for fd in (self._mark, *self._fds.values()):
            if fd >= 0:
                os.close(fd)
        self._mark = -1
        self._fds = dict.fromkeys(STREAMS, -1)

    def _keep(self, stream: StreamName, data: bytes) -> None:
        try:
            written = os.pwrite(self._opened(stream), data, self._place(stream, self._ends[stream]))
        except OSError:
            written = -1
        self._ends[stream] += written
        if written != len(data):
            self.give_up()

    def _opened(self, stream: StreamName) -> int:
        if self._fds[stream] < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            fd = self._fds[stream] = os.open(_file(stream), flags, _MODE, dir_fd=self._directory)
            os.pwrite(fd, _BASE.pack(self._bases[stream]), 0)
        return self._fds[stream]

    def _place(self, stream: StreamName, offset: int) -> int:
        return _BASE.size + offset - self._bases[stream]

    def _write_mark(self) -> None:
        assert self._marked is not None
        current = STREAMS.index(self._current)
        mark = _MARK.pack(*self._marked, *self._starts.values(), current, *self._copied.values())
        try:
            os.pwrite(self._mark, mark, 0)
        except OSError:
            self.give_up()


def _file(stream: StreamName) -> str:
    return f"{stream}.spool"
