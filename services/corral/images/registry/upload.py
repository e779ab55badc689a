"""A blob on its way into a repository.

    HEAD     is it there?
    POST     ?mount=<digest>&from=<repository of the same registry that has it>  ->  201 it is there now, or
             202 a session at Location
    PUT      the session with ?digest=: the whole blob at once; or
    PATCH    chunk after chunk, and then PUT. A chunk that breaks is taken up where GET of the session says.

Source: distribution-spec "Pushing Blobs", "Mounting a blob from another repository".
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlencode, urljoin

import structlog

from corral.images.model import Descriptor
from corral.images.registry.auth import repository_scope
from corral.images.registry.backoff import ATTEMPTS, delay_s
from corral.images.registry.endpoints import Capability
from corral.images.registry.errors import Interrupted, Refused
from corral.images.registry.host import Host, Request
from corral.images.registry.http import Body, Reply, number, shown
from corral.images.registry.repository import Repository
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import FailedPrecondition, NotFound, PermissionDenied

CHUNKED_BYTES = 64 << 20  # a blob with more goes in chunks,
CHUNK_BYTES = 16 << 20  # of this size, or what the registry asks for.
READ_BYTES = 512 << 10
MAX_CHUNK_BYTES = 1 << 30

_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,19})")
# What registries answer that want no chunks.
_NO_CHUNKS = frozenset({400, 404, 405, 411, 413, 415, 416, 501})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Session:
    """An upload that has begun: where it goes on, and from which byte."""

    location: str
    offset: int
    least_bytes: int  # of a chunk


class Upload:
    """Of one blob. `on_bytes` is told how many are there."""

    def __init__(
        self, repository: Repository, descriptor: Descriptor, path: Path, on_bytes: Callable[[int], None]
    ) -> None:
        self._repository = repository
        self._descriptor = descriptor
        self._path = path
        self._on_bytes = on_bytes
        self._scopes: Sequence[str] = (repository_scope(repository.path, "pull", "push"),)
        self._what = f"blob {descriptor.digest}"

    async def is_there(self) -> bool:
        request = Request(
            "HEAD", f"{self._repository.path}/blobs/{self._descriptor.digest}", self._scopes, expect=(200, 404)
        )
        return (await self._ask(request)).status == 200

    async def mounted(self, origin: str) -> Session | None:
        """None if the registry took it from the repository `origin`; else the session that it began instead."""
        query = urlencode({"mount": self._descriptor.digest, "from": origin})
        scopes = (*self._scopes, repository_scope(origin, "pull"))
        try:
            return await self._post(f"{self._repository.path}/blobs/uploads/?{query}", scopes, expect=(201, 202))
        except (PermissionDenied, NotFound, FailedPrecondition):  # that repository is not ours any more, or is gone
            return await self._begin()

    async def send(self, session: Session | None = None) -> None:
        """All of it. Raises the error for the user."""
        if self._descriptor.size_bytes > CHUNKED_BYTES:
            try:
                await self._in_chunks(session or await self._begin())
            except _NoChunks:
                log.info("images.registry_wants_no_chunks", registry=self._repository.reference.domain)
            else:
                return
            session = None
        await self._at_once(session)

    async def _begin(self) -> Session:
        session = await self._post(f"{self._repository.path}/blobs/uploads/", self._scopes, expect=(202,))
        assert session is not None
        return session

    async def _post(self, path: str, scopes: Sequence[str], expect: Sequence[int]) -> Session | None:
        reply = await self._ask(Request("POST", path, scopes, {"Content-Length": "0"}, expect=expect))
        return None if reply.status == 201 else _session(reply, offset=0)

    async def _at_once(self, session: Session | None) -> None:
        """A session that broke can't be gone on with, since the registry may have taken anything of it."""
        sessions = [session] if session else []
        headers = {"Content-Type": "application/octet-stream"}

        async def attempt(host: Host) -> None:
            begun = sessions.pop() if sessions else await self._begin()
            size = self._descriptor.size_bytes
            location = _with_digest(begun.location, self._descriptor)
            body = self._body(0, size)
            reply = await host.ask(
                Request("PUT", location, self._scopes, headers, expect=(201, 204), body=body, body_bytes=size)
            )
            reply.close()

        await self._repository.first(Capability.PUSH, attempt, self._what)

    async def _in_chunks(self, session: Session) -> None:
        failures, furthest = 0, session.offset
        while session.offset < self._descriptor.size_bytes:
            try:
                session = await self._repository.first(
                    Capability.PUSH, partial(self._chunk, session), self._what, patient=False
                )
            except _Broken as e:
                failures += 1
                if failures >= ATTEMPTS:
                    raise self._repository.explained(e.trouble, self._what) from e.trouble
                await asyncio.sleep(delay_s(failures))
                session = await self._where(session)
            if session.offset > furthest:
                failures, furthest = 0, session.offset
        location = _with_digest(session.location, self._descriptor)
        await self._ask(Request("PUT", location, self._scopes, {"Content-Length": "0"}, (201, 204)))

    async def _chunk(self, session: Session, host: Host) -> Session:
        start = session.offset
        end = min(start + max(CHUNK_BYTES, session.least_bytes), self._descriptor.size_bytes)
        headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{start}-{end - 1}"}
        request = Request(
            "PATCH", session.location, self._scopes, headers, (202, 204), self._body(start, end), end - start
        )
        try:
            reply = await host.ask(request)
        except Interrupted as e:
            raise _Broken(e) from e
        except Refused as e:
            if e.is_passing:
                raise _Broken(e) from e
            if e.status in _NO_CHUNKS and not start:
                raise _NoChunks from e
            raise
        reply.close()
        reached = _session(reply, offset=end, before=session)
        if reached.offset <= start:
            raise _Broken(Interrupted(shown(reply.url), "it takes a chunk and does not keep it"))
        return reached

    async def _where(self, session: Session) -> Session:
        """How far the registry has come."""
        reply = await self._ask(Request("GET", session.location, self._scopes, expect=(202, 204)))
        return _session(reply, offset=0, before=session)

    async def _ask(self, request: Request) -> Reply:
        async def attempt(host: Host) -> Reply:
            reply = await host.ask(request)
            reply.close()
            return reply

        return await self._repository.first(Capability.PUSH, attempt, self._what)

    def _body(self, start: int, end: int) -> Body:
        async def pieces() -> AsyncIterator[bytes]:
            with self._path.open("rb", 0) as file:  # quick; opened by a thread nobody would close it after a cancel
                position = start
                await run_blocking(file.seek, start)
                while position < end:
                    data = await run_blocking(file.read, min(READ_BYTES, end - position))
                    if not data:
                        raise OSError(f"{self._path} is shorter than it was")
                    position += len(data)
                    yield data
                    self._on_bytes(position)

        return pieces


class _Broken(Exception):
    def __init__(self, trouble: Interrupted | Refused) -> None:
        super().__init__(str(trouble))
        self.trouble = trouble


class _NoChunks(Exception):
    pass


def _session(reply: Reply, *, offset: int, before: Session | None = None) -> Session:
    """Raises Interrupted if the registry does not say where to go on. What it says that it has, counts."""
    location = reply.headers.get("Location", before.location if before else "")
    if not location:
        raise Interrupted(shown(reply.url), "it began no upload")
    reached = _RANGE.fullmatch(reply.headers.get("Range", ""))
    least = number(reply.headers.get("OCI-Chunk-Min-Length"))
    return Session(
        urljoin(reply.url, location),
        int(reached[1]) + 1 if reached and reached[1] != "0" else offset,
        min(least, MAX_CHUNK_BYTES) if least is not None else before.least_bytes if before else 0,
    )


def _with_digest(location: str, descriptor: Descriptor) -> str:
    return f"{location}{'&' if '?' in location else '?'}{urlencode({'digest': descriptor.digest})}"
