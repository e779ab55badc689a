"""Content as clients see it: blobs with their rows."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from corral.images import holders, leases
from corral.images.collector import Collector
from corral.images.content import READ_BYTES, ContentStore
from corral.images.digest import Digest
from corral.images.errors import explained
from corral.images.store import uninterrupted
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import FailedPrecondition, NotFound
from corral.store import Database, Snapshot, Transaction, failpoint


@dataclass(frozen=True, slots=True)
class BlobRecord:
    digest: Digest
    size_bytes: int
    created_ns: int


@dataclass(frozen=True, slots=True)
class Expected:
    """What a written blob must turn out to be; None and 0: anything."""

    digest: Digest | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Held:
    """By whom a new blob is kept, and without a lease for how long."""

    namespace: str
    lease: str
    grace_ns: int


def insert_blob(transaction: Transaction, digest: Digest, size_bytes: int, *, keep_until_ns: int = 0) -> None:
    transaction.execute(
        "INSERT INTO blobs (digest, size_bytes, created_ns, keep_until_ns) VALUES (?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET keep_until_ns = max(keep_until_ns, excluded.keep_until_ns)",
        (digest, size_bytes, time.time_ns(), keep_until_ns),
    )


def is_stored(snapshot: Snapshot, content: ContentStore, digest: Digest) -> bool:
    """Whether the blob has both its row and its file."""
    return _find(snapshot, digest) is not None and content.has(digest)


class Blobs:
    """See the module."""

    def __init__(self, database: Database, content: ContentStore, collector: Collector, *, grace_s: float) -> None:
        self._database = database
        self._content = content
        self._collector = collector
        self._grace_ns = int(grace_s * 1e9)

    def info(self, digest: Digest) -> BlobRecord:
        """Raises NotFound."""
        found = self._database.read_sync(lambda s: _find(s, digest))
        if found is None:
            raise _unknown(digest)
        return found

    def check_held(self, namespace: str, digest: Digest) -> None:
        """Raises NotFound for what the namespace has not brought itself."""
        if not self._database.read_sync(lambda s: holders.has(s, namespace, digest)):
            raise _unknown(digest)

    async def list(self, namespace: str) -> Sequence[BlobRecord]:
        """Those that the namespace has brought."""
        return await self._database.read(lambda s: _held_by(s, namespace))

    async def read(self, digest: Digest, offset: int, length: int) -> AsyncGenerator[bytes]:
        """The bytes from `offset`; length 0: to the end. Raises NotFound, also when it is gone meanwhile."""
        size = self.info(digest).size_bytes
        end = min(offset + length, size) if length else size
        path = self._content.path(digest)
        async with self._content.whole(path):
            try:
                # Quick, and not for a thread: nobody would close what that opens when the reader has gone.
                file = path.open("rb", 0)
            except FileNotFoundError as e:
                raise _unknown(digest) from e
            try:
                await run_blocking(file.seek, offset)
                while offset < end and (data := await run_blocking(file.read, min(READ_BYTES, end - offset))):
                    offset += len(data)
                    yield data
            finally:
                file.close()

    async def write(self, expected: Expected, source: AsyncIterator[bytes], namespace: str, lease: str) -> BlobRecord:
        """Store what `source` yields. Raises InvalidArgument if it is not as expected, ResourceExhausted."""
        try:
            ingest = await run_blocking(self._content.begin, expected.digest or "")
        except OSError as e:
            raise explained(e, "cannot store the blob") from e
        try:
            async for data in source:
                await run_blocking(ingest.write, data)
            ingest.verify(expected.digest, expected.size_bytes)
            await run_blocking(ingest.sync)
            place = partial(self._content.publish, ingest.path)
            held = _Held(namespace, lease, self._grace_ns)
            return await uninterrupted(self._publish(place, ingest.digest, ingest.size_bytes, held))
        except OSError as e:
            raise explained(e, "cannot store the blob") from e
        finally:
            await run_blocking(ingest.discard)

    async def admit(
        self, path: Path, digest: Digest, size_bytes: int, namespace: str, lease: str, *, keep_s: float
    ) -> BlobRecord:
        """Take a proven and synced file, which stays where it is, for a blob. Raises ResourceExhausted, Internal."""
        held = _Held(namespace, lease, max(int(keep_s * 1e9), self._grace_ns))
        try:
            return await uninterrupted(self._publish(partial(self._content.link, path), digest, size_bytes, held))
        except OSError as e:
            raise explained(e, "cannot store the blob") from e

    async def _publish(
        self, place: Callable[[Digest], None], digest: Digest, size_bytes: int, held: "_Held"
    ) -> BlobRecord:
        async with self._collector.changing:
            known = self._database.read_sync(lambda s: is_stored(s, self._content, digest))
            if not known:
                await run_blocking(place, digest)
                await run_blocking(self._content.sync_names)
            failpoint("images.write.before_row")
            try:
                return await self._database.write(lambda t: _insert(t, digest, size_bytes, held))
            except BaseException:
                if not known:
                    await run_blocking(self._content.remove, [digest])
                raise

    async def delete(self, digest: Digest, namespace: str) -> None:
        """Raises NotFound, FailedPrecondition."""
        async with self._collector.changing:
            await uninterrupted(self._delete(digest, namespace))

    async def _delete(self, digest: Digest, namespace: str) -> None:
        await self._database.write(lambda t: _delete(t, digest, namespace))
        await run_blocking(self._content.remove, [digest])


def _insert(transaction: Transaction, digest: Digest, size_bytes: int, held: _Held) -> BlobRecord:
    keep_until = 0 if held.lease else time.time_ns() + held.grace_ns
    insert_blob(transaction, digest, size_bytes, keep_until_ns=keep_until)
    leases.hold(transaction, held.namespace, held.lease, "blob", digest)
    holders.record(transaction, held.namespace, [digest])
    found = _find(transaction, digest)
    assert found is not None
    return found


def _record(row: Sequence[object]) -> BlobRecord:
    digest, size_bytes, created_ns = row
    return BlobRecord(Digest(str(digest)), int(str(size_bytes)), int(str(created_ns)))


def _find(snapshot: Snapshot, digest: Digest) -> BlobRecord | None:
    row = snapshot.one("SELECT digest, size_bytes, created_ns FROM blobs WHERE digest = ?", (digest,))
    return None if row is None else _record(tuple(row))


def _held_by(snapshot: Snapshot, namespace: str) -> list[BlobRecord]:
    rows = snapshot.execute(
        "SELECT digest, size_bytes, created_ns FROM blobs JOIN blob_holders USING (digest) WHERE namespace = ?"
        " ORDER BY digest",
        (namespace,),
    )
    return [_record(tuple(row)) for row in rows]


def _delete(transaction: Transaction, digest: Digest, namespace: str) -> None:
    if not holders.has(transaction, namespace, digest):
        raise _unknown(digest)
    user = _user_of(transaction, digest, namespace)
    if user:
        raise FailedPrecondition(f"blob {digest} is used by {user}: remove that first", reason="IN_USE")
    transaction.execute("DELETE FROM blobs WHERE digest = ?", (digest,))


def _user_of(snapshot: Snapshot, digest: Digest, namespace: str) -> str:
    """What refers to a blob, in words; what lies in other namespaces is not named."""
    image = snapshot.one(
        "SELECT namespace, coalesce(nullif(name, ''), image_id) AS name FROM images"
        " WHERE ? IN (target_digest, manifest_digest) ORDER BY namespace != ?",
        (digest, namespace),
    )
    if image is not None:
        return f"image {image['name']}" if image["namespace"] == namespace else "an image of another namespace"
    parent = snapshot.one("SELECT parent FROM blob_edges WHERE child = ?", (digest,))
    if parent is not None:
        return f"manifest {parent[0]}"
    lease = snapshot.one(
        "SELECT namespace, lease FROM lease_resources WHERE kind = 'blob' AND key = ? ORDER BY namespace != ?",
        (digest, namespace),
    )
    if lease is not None:
        return f"lease {lease['lease']}" if lease["namespace"] == namespace else "a lease of another namespace"
    return ""


def _unknown(digest: Digest) -> NotFound:
    return NotFound(f"there is no blob {digest}", reason="NO_BLOB", metadata={"digest": digest})
