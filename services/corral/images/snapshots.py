"""Active trees and views: made, looked up, committed, removed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from corral.images import catalog, leases, trees
from corral.images.catalog import ImageRecord
from corral.images.collector import Collector
from corral.images.drivers import Drivers
from corral.images.errors import explained
from corral.images.images import Images
from corral.images.policy.gate import Gate
from corral.images.snapshotter import Mount, Usage
from corral.images.store import SHARED, uninterrupted
from corral.images.tending import Tending
from corral.images.trees import Kind, TreeRecord
from corral.images.unpacker import TreeIds
from corral.rpc.blocking import run_blocking, run_long
from corral.rpc.context import check_id
from corral.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from corral.store import Database, Duplicate, Referenced, Snapshot, Transaction, failpoint

MIN_QUOTA_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tree that is asked for: on an image, on a committed snapshot, or on nothing."""

    namespace: str
    key: str
    kind: Kind
    image: str = ""
    parent: str = ""
    labels: Mapping[str, str] | None = None
    lease: str = ""
    quota_bytes: int = 0
    persist_later: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """The tree, and how to mount it."""

    record: TreeRecord
    mounts: Sequence[Mount]
    image: ImageRecord | None


@dataclass(frozen=True, slots=True)
class _Found:
    """What is here of what is wanted."""

    image: ImageRecord | None
    parent: TreeRecord | None
    existing: TreeRecord | None


class Snapshots:
    """See the module."""

    def __init__(
        self,
        database: Database,
        drivers: Drivers,
        images: Images,
        tending: Tending,
        collector: Collector,
        ids: TreeIds,
        gate: Gate,
    ) -> None:
        self._gate = gate
        self._database = database
        self._drivers = drivers
        self._images = images
        self._tending = tending
        self._collector = collector
        self._ids = ids

    async def prepare(self, wanted: Wanted) -> Prepared:
        """Make the tree; the same call again finds it. A loss of power takes no active one: with persist_later, once
        persist() was called.

        Raises NotFound, AlreadyExists, PermissionDenied where the policy refuses the image.
        """
        check_id(wanted.key, "snapshot key")
        found = self._database.read_sync(lambda s: self._look_up(s, wanted))
        if found is None:
            async with self._collector.pinned([(await self._images.unpacked(wanted.namespace, wanted.image)).chain_id]):
                found = self._database.read_sync(lambda s: self._look_up(s, wanted))
            if found is None:
                raise _gone(wanted.image)
        existing = found.existing
        if existing is None:
            with self._collector.using([found.image.image_id] if found.image else []):
                existing = await uninterrupted(self._make(wanted, found))
        else:
            _check_same(wanted, existing, found.parent)
            if not wanted.lease:
                await self._take_from_leases(wanted)
        if existing.kind is Kind.ACTIVE and not wanted.persist_later:
            await self.persist()
        return Prepared(existing, self._mounts(existing), found.image)

    async def persist(self) -> None:
        """Have the rows of trees reach the disk: a tree without one goes, with all that was synced in it."""
        await self._database.persist()

    def _look_up(self, snapshot: Snapshot, wanted: Wanted) -> _Found | None:
        """All that prepare needs to know, in one read; None if the image has to be unpacked first."""
        image = parent = None
        existing = trees.own(snapshot, wanted.namespace, wanted.key)
        driver = self._drivers.default.name if existing is None else existing.driver
        if wanted.image:
            image = catalog.find(snapshot, wanted.namespace, wanted.image)
            if existing is None:
                self._gate.check_use(snapshot, image, wanted.image)
            if image.chain_id:
                parent = trees.layer(snapshot, image.chain_id, driver)
            if parent is None and existing is None and not self._images.is_empty(image):
                return None
        elif wanted.parent:
            parent = self._parent(snapshot, wanted.namespace, wanted.parent)
            if existing is None and parent.namespace == SHARED:
                self._gate.check_layer(snapshot, wanted.namespace, parent.key)
        return _Found(image, parent, existing)

    def _parent(self, snapshot: Snapshot, namespace: str, key: str) -> TreeRecord:
        found = trees.own(snapshot, namespace, key) or trees.layer(snapshot, key, self._drivers.default.name)
        if found is None:
            raise NotFound(f"there is no committed snapshot {key[:140]!r} to build on", reason="NO_SNAPSHOT")
        if found.kind is not Kind.COMMITTED:
            raise FailedPrecondition(
                f"snapshot {key!r} is still being written to: commit it before something is built on it"
            )
        return found

    async def _make(self, wanted: Wanted, found: _Found) -> TreeRecord:
        """Directories first, then the row: a crash in between leaves directories that nothing describes."""
        image, parent = found.image, found.parent
        default = self._drivers.default.name
        driver = default if parent is None else parent.driver
        ready = self._tending.take() if wanted.kind is Kind.ACTIVE and driver == default else None
        record = trees.new_record(
            ready or self._ids.new(),
            namespace=wanted.namespace,
            key=wanted.key,
            kind=wanted.kind,
            parent=parent,
            driver=driver,
            image_id=image.image_id if image else "",
            image_name=image.name if image else "",
            labels=wanted.labels,
            quota_bytes=wanted.quota_bytes,
        )
        await self._check_quota(record)
        try:
            await self._make_tree(record, wanted, is_ready=ready is not None)
        except BaseException as e:
            self._tending.remove([record.id])
            if not isinstance(e, Duplicate):
                raise
        else:
            return record
        # Somebody else made it at the same moment.
        existing = self._database.read_sync(lambda s: trees.own(s, wanted.namespace, wanted.key))
        if existing is None:
            raise _gone(wanted.key)
        _check_same(wanted, existing, parent)
        return existing

    async def _check_quota(self, record: TreeRecord) -> None:
        """Raises InvalidArgument, FailedPrecondition if the tree cannot be bounded as it shall be."""
        if not record.quota_bytes:
            return
        if record.kind is not Kind.ACTIVE or record.quota_bytes < MIN_QUOTA_BYTES:
            raise InvalidArgument(
                f"a quota is for a writable tree, and of at least {MIN_QUOTA_BYTES >> 20} MiB", reason="BAD_QUOTA"
            )
        if reason := await run_blocking(self._drivers.of(record.driver).check_quota):
            raise FailedPrecondition(
                f"snapshot driver {record.driver} cannot bound a writable tree here: {reason}; leave out the quota",
                reason="NO_QUOTA",
            )

    async def _make_tree(self, record: TreeRecord, wanted: Wanted, *, is_ready: bool) -> None:
        writable, driver = wanted.kind is Kind.ACTIVE, self._drivers.of(record.driver)
        quota_bytes = record.quota_bytes
        try:
            if (is_ready or not writable) and not quota_bytes and driver.is_quick(record.chain, writable=writable):
                driver.prepare(record.id, record.chain, writable=writable)
            else:
                await run_long(driver.prepare, record.id, record.chain, writable=writable, quota_bytes=quota_bytes)
            failpoint("images.prepare.before_row")
            await self._database.write(lambda t: _insert(t, record, wanted))
            failpoint("images.prepare.after_row")
        except Referenced as e:
            raise _gone(wanted.image or wanted.parent) from e
        except OSError as e:
            raise explained(e, f"cannot make snapshot {wanted.key!r}") from e

    async def _take_from_leases(self, wanted: Wanted) -> None:
        def release(transaction: Transaction) -> None:
            leases.release(transaction, wanted.namespace, "snapshot", wanted.key)

        await self._database.write(release)

    def _mounts(self, record: TreeRecord) -> list[Mount]:
        driver, writable = self._drivers.of(record.driver), record.kind is Kind.ACTIVE
        return driver.mounts(record.id, record.chain, writable=writable, quota_bytes=record.quota_bytes)

    def get(self, namespace: str, key: str) -> TreeRecord:
        """The namespace's own snapshot, else the shared layer of that name. Raises NotFound."""

        def look_up(snapshot: Snapshot) -> TreeRecord | None:
            return trees.own(snapshot, namespace, key) or trees.layer(snapshot, key, self._drivers.default.name)

        found = self._database.read_sync(look_up)
        if found is None:
            raise _unknown(key)
        return found

    def mounts(self, namespace: str, key: str) -> list[Mount]:
        """Raises NotFound, FailedPrecondition."""
        record = self.get(namespace, key)
        if record.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key!r} is committed: ask for a view of it to mount it")
        return self._mounts(record)

    def below_bytes(self, namespace: str, key: str) -> int:
        """What the layers below a snapshot take. Raises NotFound."""
        record = self.get(namespace, key)
        return self._database.read_sync(lambda s: trees.size_of(s, record.chain))

    async def usage(self, namespace: str, key: str) -> Usage:
        """Raises NotFound."""
        record = self.get(namespace, key)
        if record.kind is Kind.COMMITTED:
            return Usage(record.size_bytes, record.inodes)
        return await run_long(self._drivers.of(record.driver).usage, record.id)

    async def list(self, namespace: str, kind: Kind | None) -> Sequence[tuple[TreeRecord, str]]:
        """Each with its parent's key."""

        def look_up(snapshot: Snapshot) -> Sequence[tuple[TreeRecord, str]]:
            found = trees.everything(snapshot, namespace, kind)
            return [(record, trees.key_of(snapshot, record.parent)) for record in found]

        return await self._database.read(look_up)

    def parent_key(self, record: TreeRecord) -> str:
        return self._database.read_sync(lambda s: trees.key_of(s, record.parent))

    async def remove(self, namespace: str, key: str, *, must_exist: bool) -> None:
        """Raises NotFound if it must exist, FailedPrecondition if something lies on it.

        The row goes at once; the files in the background.
        """
        removed = await self._database.write(lambda t: _delete(t, namespace, key))
        if removed is None:
            if must_exist:
                raise _unknown(key)
            return
        failpoint("images.remove.after_row")
        self._tending.remove([removed.id])

    async def commit(self, namespace: str, key: str, name: str) -> TreeRecord:
        """Turn an active tree into a committed snapshot of the namespace. Its user must have unmounted it.

        Raises NotFound, FailedPrecondition, AlreadyExists.
        """
        check_id(name.replace(":", "-"), "snapshot name")
        record = self.get(namespace, key)
        if record.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key!r} is not an active one: only those can be committed")
        return await uninterrupted(self._commit(record, name))

    async def _commit(self, record: TreeRecord, name: str) -> TreeRecord:
        driver = self._drivers.of(record.driver)
        usage = await run_long(driver.usage, record.id)
        try:
            await self._database.write(lambda t: _commit_row(t, record, name, usage))
        except Duplicate as e:
            raise AlreadyExists(f"snapshot {name!r} already exists") from e
        failpoint("images.commit.after_row")
        try:
            await run_long(driver.adopt, record.id)
        except OSError as e:
            raise explained(e, f"cannot commit snapshot {record.key!r}") from e
        await self._database.persist()
        return self.get(record.namespace, name)


def _check_same(wanted: Wanted, existing: TreeRecord, parent: TreeRecord | None) -> None:
    if existing.quota_bytes != wanted.quota_bytes and existing.kind is wanted.kind:
        raise AlreadyExists(
            f"snapshot {wanted.key!r} already exists, with another quota: remove it, or choose another key",
            reason="SNAPSHOT_EXISTS",
        )
    if existing.kind is not wanted.kind or existing.parent != (parent.id if parent else None):
        raise AlreadyExists(
            f"snapshot {wanted.key!r} already exists, on another parent: remove it, or choose another key",
            reason="SNAPSHOT_EXISTS",
        )


def _gone(name: str) -> NotFound:
    return NotFound(f"{name!r} was removed at the same moment: make it again, and try once more", reason="REMOVED")


def _insert(transaction: Transaction, record: TreeRecord, wanted: Wanted) -> None:
    trees.insert(transaction, record)
    leases.hold(transaction, wanted.namespace, wanted.lease, "snapshot", wanted.key)
    facts = {"kind": record.kind.name.lower(), "image": wanted.image, "parent": wanted.parent}
    transaction.journal("snapshot.prepared", record.key, facts, namespace=record.namespace)


def _delete(transaction: Transaction, namespace: str, key: str) -> TreeRecord | None:
    record = trees.own(transaction, namespace, key)
    if record is None:
        return None
    try:
        trees.delete(transaction, record.id)
    except Referenced as e:
        above = trees.children_of(transaction, record.id)
        raise FailedPrecondition(
            f"snapshot {key!r} cannot be removed while {above[0]!r} lies on it: remove that first", reason="IN_USE"
        ) from e
    leases.release(transaction, namespace, "snapshot", key)
    if record.image_id:
        catalog.note_use(transaction, namespace, record.image_id)
    transaction.journal("snapshot.removed", key, {}, namespace=namespace)
    return record


def _commit_row(transaction: Transaction, record: TreeRecord, name: str, usage: Usage) -> None:
    trees.commit(transaction, record, name, usage.size_bytes, usage.inodes)
    transaction.journal("snapshot.committed", name, {"from": record.key}, namespace=record.namespace)
    transaction.execute(
        "UPDATE OR IGNORE lease_resources SET key = ? WHERE namespace = ? AND kind = 'snapshot' AND key = ?",
        (name, record.namespace, record.key),
    )


def _unknown(key: str) -> NotFound:
    return NotFound(f"there is no snapshot {key[:140]!r}", reason="NO_SNAPSHOT", metadata={"key": key[:140]})
