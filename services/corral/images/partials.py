"""Blobs of which only a part is here: kept over a restart, for whoever wants the same blob next.

    partial/<hex>@<namespace>.data    the bytes, each where it belongs in the blob
    partial/<hex>@<namespace>.log     "<size of the blob>", then one line "<from> <to>" per piece that was written

Of the default namespace they are without its name. Namespaces do not share them: who may see a blob is shown by who
gets all of it from a registry.
A line is appended after its piece, so that a kill at any moment loses at most the pieces in flight. A power loss may
lose pieces that the log tells of; the digest shows that, and the blob is then fetched anew.
"""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import structlog

from corral.images.content import READ_BYTES
from corral.images.digest import Digest, digest_by, digest_of_hex, hasher, hex_of
from corral.images.store import uninterrupted
from corral.rpc.blocking import run_blocking
from corral.rpc.context import DEFAULT_NAMESPACE
from corral.store import failpoint

DATA = ".data"
LOG = ".log"
BETWEEN = "@"
SWEEP_S = 3600.0
_LINE = re.compile(rb"^(\d{1,19}) (\d{1,19})$", re.MULTILINE)

log = structlog.get_logger()

type Range = tuple[int, int]  # from, and up to but not including


def merged(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes as ranges that do not touch, in order."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > start:
            found.append((start, end))
    return found


class Partial:
    """One blob that is being put together. Blocking; pieces may be written by several threads."""

    def __init__(self, stem: Path, digest: Digest, size_bytes: int) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self.path = _file(stem, DATA)
        self.hashed = 0
        self.recalled = 0
        """Bytes that an earlier one has left."""
        self._log_path = _file(stem, LOG)
        self._lock = Lock()
        self._hash = hasher(digest)
        self._ranges: list[Range] = []
        self._fd = self._log = -1

    def open(self) -> None:
        """Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        self._log = os.open(self._log_path, flags | os.O_APPEND, 0o600)
        self._ranges = self._recall()
        self.recalled = sum(end - start for start, end in self._ranges)

    def _recall(self) -> list[Range]:
        """What the log tells; a last line that was cut off does not count. Another size begins anew."""
        header = f"{self.size_bytes}\n".encode()
        text = self._log_path.read_bytes()
        if not text.startswith(header):
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._log, 0)
            os.write(self._log, header)
            return []
        whole = text[len(header) : text.rfind(b"\n") + 1]
        if not text.endswith(b"\n"):
            os.ftruncate(self._log, len(header) + len(whole))
        os.utime(self._log_path)
        there = os.fstat(self._fd).st_size
        found = [(int(line[1]), int(line[2])) for line in _LINE.finditer(whole)]
        return merged([(start, min(end, there)) for start, end in found if end <= self.size_bytes])

    @property
    def done_bytes(self) -> int:
        with self._lock:
            return sum(end - start for start, end in self._ranges)

    def missing(self) -> list[Range]:
        """What is still to be fetched, in order."""
        with self._lock:
            ranges = list(self._ranges)
        starts = [0, *(end for _, end in ranges)]
        ends = [*(start for start, _ in ranges), self.size_bytes]
        return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]

    def write(self, offset: int, pieces: Sequence[bytes]) -> int:
        """Put bytes in their place; returns the offset behind them. Raises OSError."""
        start, data = offset, memoryview(b"".join(pieces))
        while data:
            written = os.pwrite(self._fd, data, offset)
            offset += written
            data = data[written:]
        os.write(self._log, f"{start} {offset}\n".encode())
        with self._lock:
            self._ranges = merged([*self._ranges, (start, offset)])
        failpoint("images.pull.after_piece")
        return offset

    @property
    def hashable(self) -> int:
        """Up to where there is no gap."""
        with self._lock:
            return self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0

    def hash_on(self, at_most: int) -> None:
        """Hash what has come without a gap, by one thread at a time. Reads what was just written: from memory, then."""
        end = min(self.hashable, self.hashed + at_most)
        while self.hashed < end:
            data = os.pread(self._fd, min(READ_BYTES, end - self.hashed), self.hashed)
            if not data:
                raise OSError(f"{self.path} is shorter than its log says")
            self._hash.update(data)
            self.hashed += len(data)

    @property
    def is_proven(self) -> bool:
        return self.hashed == self.size_bytes and self.found_digest == self.digest

    @property
    def found_digest(self) -> str:
        return digest_by(self._hash)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        """Harmless when repeated, or before open()."""
        for fd in (self._fd, self._log):
            if fd >= 0:
                os.close(fd)
        self._fd = self._log = -1

    def remove(self) -> None:
        """The log last: data without a log counts for nothing, a log with it does."""
        self.path.unlink(missing_ok=True)
        self._log_path.unlink(missing_ok=True)


def _file(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)  # a namespace may have dots


def _digest_of(stem: Path) -> Digest | None:
    return digest_of_hex(stem.name.partition(BETWEEN)[0])


def _remove(stem: Path, oldest: float) -> int | None:
    """Unless it is younger, or is gone: a pull may have ended meanwhile. How many bytes are free by that."""
    found = {path: entry for path in (_file(stem, DATA), _file(stem, LOG)) if (entry := _stat(path))}
    # A file with another name is a blob by now: whoever made it one was killed before it took this name away.
    is_blob = any(entry.st_nlink > 1 for entry in found.values())
    if not found or (not is_blob and any(entry.st_mtime > oldest for entry in found.values())):
        return None
    for path in found:
        path.unlink(missing_ok=True)
    return 0 if is_blob else sum(entry.st_blocks * 512 for entry in found.values())


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Part:
    """What there is of one blob."""

    digest: str
    size_bytes: int
    is_open: bool
    """Somebody is fetching it now."""


class Partials:
    """All of them. No namespace may open the same digest twice at a time."""

    def __init__(self, root: Path, *, keep_s: float) -> None:
        self._directory = root / "partial"
        self._directory.mkdir(exist_ok=True, mode=0o700)
        self._keep_s = keep_s
        self._open: set[str] = set()
        self._choosing = Lock()  # so that nobody opens what is just found to be nobody's
        self._sweeping: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def opened(self, namespace: str, digest: Digest, size_bytes: int) -> AsyncIterator[Partial]:
        """Within the block nobody collects it. Raises OSError."""
        name = hex_of(digest) + (f"{BETWEEN}{namespace}" if namespace != DEFAULT_NAMESPACE else "")
        partial = Partial(self._directory / name, digest, size_bytes)
        try:
            await uninterrupted(run_blocking(self._begin, partial))
            yield partial
        finally:
            partial.close()
            self._open.discard(partial.path.stem)

    def _begin(self, partial: Partial) -> None:
        with self._choosing:
            self._open.add(partial.path.stem)
        partial.open()

    def found(self) -> list[Part]:
        """All that are here, and what they take on disk. Blocking."""
        parts = []
        for stem in sorted({path.with_suffix("") for path in self._directory.iterdir()}):
            entries = [_stat(_file(stem, suffix)) for suffix in (DATA, LOG)]
            # A file with another name is a blob by now, and counts as that.
            size = sum(entry.st_blocks * 512 for entry in entries if entry is not None and entry.st_nlink == 1)
            parts.append(Part(_digest_of(stem) or stem.name, size, stem.name in self._open))
        return parts

    def leftovers(self, is_stored: Callable[[str], bool]) -> Mapping[str, str]:
        """Names of what nobody will go on with, and why. is_stored tells of a digest whether it is a blob. Blocking."""
        names: dict[str, set[str]] = {}
        for path in self._directory.iterdir():
            names.setdefault(path.stem, set()).add(path.suffix)
        found = {}
        for stem, suffixes in names.items():
            if stem in self._open:
                continue
            digest = _digest_of(Path(stem))
            if digest is None or not suffixes <= {DATA, LOG}:
                found[stem] = "is nothing of ours"
            elif suffixes != {DATA, LOG}:
                found[stem] = "has lost one of its files"
            elif BETWEEN not in stem and is_stored(digest):  # of others: whoever had it may be the default's
                found[stem] = "has come to its end: its blob is here"
        return found

    def remove(self, stem: str) -> None:
        """What leftovers() has found, unless somebody goes on with it now. Blocking."""
        with self._choosing:
            if stem not in self._open:
                for path in list(self._directory.glob(f"{stem}*")):
                    if path.stem == stem:
                        path.unlink(missing_ok=True)

    def collect(self, *, grace: bool = True) -> tuple[list[str], int]:
        """Remove those that nobody came back for; without grace, all that are not open. Digests, and their bytes."""
        oldest = time.time() - self._keep_s if grace else float("inf")
        removed, reclaimed = [], 0
        for stem in {path.with_suffix("") for path in self._directory.iterdir()}:
            with self._choosing:
                freed = None if stem.name in self._open else _remove(stem, oldest)
            if freed is not None:
                removed.append(_digest_of(stem) or stem.name)
                reclaimed += freed
        return removed, reclaimed

    def start(self) -> None:
        """Collect from time to time."""
        self._sweeping = asyncio.ensure_future(self._sweep())

    async def stop(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait((self._sweeping,))

    async def _sweep(self) -> None:
        while True:
            try:
                removed, reclaimed = await run_blocking(self.collect)
            except OSError as e:
                log.warning("images.partials_not_collected", error=str(e))
            else:
                if removed:
                    log.info("images.partials_collected", count=len(removed), reclaimed_bytes=reclaimed)
            await asyncio.sleep(max(min(self._keep_s, SWEEP_S), 1.0))
