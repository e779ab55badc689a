"""One blob on its way: parts of it are fetched side by side, written where they belong, and hashed in order behind.

Whatever was written stays when the download ends early, also by a kill: the next one fetches what is missing.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from corral.images.model import Descriptor
from corral.images.partials import Partial, Range
from corral.images.registry import backoff
from corral.images.registry.crew import crew
from corral.images.registry.errors import Interrupted
from corral.images.registry.host import Host
from corral.images.registry.repository import BlobStream, Repository
from corral.images.store import uninterrupted
from corral.rpc.blocking import run_blocking

SPLIT_BYTES = 32 << 20  # a blob with more is fetched in parts,
PART_BYTES = 16 << 20  # of this size,
PARTS = 4  # so many at a time.
PIECE_BYTES = 512 << 10
HASH_BYTES = 8 << 20

log = structlog.get_logger()


@dataclass(slots=True)
class Part:
    """What one connection fetches; `start` moves on with it."""

    start: int
    end: int


class Download:
    """Into a partial blob. `on_bytes` is told how many are there."""

    def __init__(
        self, repository: Repository, descriptor: Descriptor, partial: Partial, on_bytes: Callable[[int], None]
    ) -> None:
        self._repository = repository
        self._descriptor = descriptor
        self._partial = partial
        self._on_bytes = on_bytes
        self.hosts: set[Host] = set()
        """Those that brought something."""
        self._came = asyncio.Event()
        self._parts = parts(partial.missing())

    async def run(self) -> None:
        """Fetch and hash all of it. Raises the error for the user, OSError."""
        self._on_bytes(self._partial.recalled)
        async with crew() as tasks:
            tasks.create_task(self._hash())
            if part := next(self._parts, None):
                await self._lead(tasks, part)

    async def _lead(self, tasks: asyncio.TaskGroup, part: Part) -> None:
        """The first part. Its answer shows whether the host gives parts at all, so that others may come beside it."""

        def begun(stream: BlobStream) -> None:
            if stream.is_whole:
                part.end = self._descriptor.size_bytes
                self._parts = iter(())
            for _ in range(PARTS - 1):
                tasks.create_task(self._follow())

        await self._fetch(part, begun)
        await self._follow()

    async def _follow(self) -> None:
        while part := next(self._parts, None):
            await self._fetch(part)

    async def _fetch(self, part: Part, begun: Callable[[BlobStream], None] | None = None) -> None:
        """A connection that breaks is taken up again where it ended, as long as each brings anything."""
        failures = 0
        while part.start < part.end:
            async with self._repository.streams:
                stream = await self._repository.open_blob(self._descriptor, part.start, part.end)
                if begun is not None:
                    begun(stream)
                    begun = None
                self.hosts.add(stream.host)
                before = part.start
                problem = await self._take(stream, part)
            if problem is not None:
                failures = failures + 1 if part.start == before else 1
                await self._pause(stream, problem, failures)

    async def _pause(self, stream: BlobStream, problem: Interrupted, failures: int) -> None:
        stream.host.failures += 1
        log.info("images.download_interrupted", digest=self._descriptor.digest, error=str(problem))
        if failures >= backoff.ATTEMPTS:
            raise self._repository.explained(problem, f"blob {self._descriptor.digest}") from problem
        await asyncio.sleep(backoff.delay_s(failures))

    async def _take(self, stream: BlobStream, part: Part) -> Interrupted | None:
        """Write what the stream brings of the part. While a piece is written the next one arrives."""
        writing: asyncio.Future[int] | None = None
        try:
            async for offset, pieces in _gathered(stream, part.start, part.end):
                if writing is not None:
                    self._count(part, await asyncio.shield(writing))
                writing = asyncio.ensure_future(run_blocking(self._partial.write, offset, pieces))
        except Interrupted as e:
            return e
        finally:
            stream.reply.close()
            if writing is not None:
                writing.add_done_callback(_heard)  # also if a cancellation comes before its result is looked at
                await uninterrupted(asyncio.wait((writing,)))  # the file is closed after it
                self._count(part, writing.result())
        return None

    def _count(self, part: Part, end: int) -> None:
        part.start = end
        self._on_bytes(self._partial.done_bytes)
        self._came.set()

    async def _hash(self) -> None:
        while self._partial.hashed < self._partial.size_bytes:
            self._came.clear()
            while self._partial.hashed < self._partial.hashable:
                await uninterrupted(run_blocking(self._partial.hash_on, HASH_BYTES))
            if self._partial.hashed < self._partial.size_bytes:
                await self._came.wait()


def _heard(writing: asyncio.Future[int]) -> None:
    if not writing.cancelled():
        writing.exception()


async def _gathered(stream: BlobStream, start: int, end: int) -> AsyncIterator[tuple[int, list[bytes]]]:
    """What belongs between `start` and `end`, in pieces worth a write. Raises Interrupted if the stream ends before."""
    position, gathered = stream.start, 0
    pieces: list[bytes] = []
    try:
        async for arrived in stream.reply.pieces():
            skipped = min(max(start - position, 0), len(arrived))
            piece = arrived[skipped : skipped + end - max(position, start)]
            position += skipped + len(piece)
            gathered += len(piece)
            pieces.append(piece)
            if gathered >= PIECE_BYTES or position == end:
                yield position - gathered, pieces
                pieces, gathered = [], 0
            if position == end:
                return
    except Interrupted:
        if gathered:
            yield position - gathered, pieces
        raise
    if gathered:
        yield position - gathered, pieces
    raise Interrupted(stream.host.endpoint.authority, f"the blob ended after {position} bytes instead of {end}")


def parts(missing: Sequence[Range]) -> Iterator[Part]:
    """What to fetch, made one by one: how large a blob is, is what a stranger says."""
    split = sum(end - start for start, end in missing) > SPLIT_BYTES
    for start, end in missing:
        step = PART_BYTES if split else end - start
        for begin in range(start, end, step):
            yield Part(begin, min(begin + step, end))
