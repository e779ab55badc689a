"""Leases: what nothing else refers to yet stays while one lives, and goes with it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from support.images import digest
from support.images_leaf import ImagesLeaf, images_leaf, lease_metadata
from support.requirements import needs
from support.tars import packed

from corral.api.images.v1 import images_pb2 as pb
from corral.rpc.context import in_namespace
from corral.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

pytestmark = needs("root", "overlayfs")


def seconds(value: float) -> Duration:
    return Duration(seconds=int(value), nanos=int(value % 1 * 1e9))


async def create(leaf: ImagesLeaf, name: str = "", ttl_s: float = 0) -> pb.Lease:
    return await leaf.leases.Create(pb.CreateLeaseRequest(id=name, ttl=seconds(ttl_s)))


async def write(leaf: ImagesLeaf, data: bytes, lease: str = "") -> pb.BlobInfo:
    async def requests() -> AsyncIterator[pb.WriteBlobRequest]:
        for start in range(0, len(data), 1000):
            yield pb.WriteBlobRequest(data=data[start : start + 1000])

    return await leaf.content.Write(requests(), metadata=lease_metadata(lease))


async def blobs(leaf: ImagesLeaf) -> set[str]:
    return {blob.digest async for blob in leaf.content.List(pb.ListBlobsRequest())}


async def until(leaf: ImagesLeaf, *, disk: set[str]) -> None:
    for _ in range(1000):
        if leaf.disk() == disk:
            return
        await asyncio.sleep(0.02)
    assert leaf.disk() == disk


async def test_a_lease_is_created_renewed_listed_and_deleted(leaf: ImagesLeaf) -> None:
    made = await create(leaf, "mine")
    assert made.id == "mine"
    assert made.expires_at.seconds - made.created_at.seconds == 3600
    with pytest.raises(AlreadyExists, match="'mine' already exists"):
        await create(leaf, "mine")
    renewed = await leaf.leases.Renew(pb.RenewLeaseRequest(id="mine", ttl=seconds(7200)))
    assert renewed.expires_at.seconds >= made.expires_at.seconds + 3600
    generated = await create(leaf)
    assert len(generated.id) == 16
    listed = await leaf.leases.List(pb.ListLeasesRequest())
    assert {lease.id for lease in listed.leases} == {"mine", generated.id}
    for _ in range(2):
        await leaf.leases.Delete(pb.DeleteLeaseRequest(id="mine"))
    with pytest.raises(NotFound, match="does not exist or has expired"):
        await leaf.leases.Renew(pb.RenewLeaseRequest(id="mine"))
    for ttl_s in (8 * 24 * 3600, -1):
        with pytest.raises(InvalidArgument, match="at most a week"):
            await create(leaf, ttl_s=ttl_s)
    with in_namespace("other"):
        assert len((await leaf.leases.List(pb.ListLeasesRequest())).leases) == 0


async def test_a_blob_stays_as_long_as_its_lease(leaf: ImagesLeaf) -> None:
    await create(leaf, "one")
    await create(leaf, "two")
    for lease in ("one", "two"):
        await write(leaf, b"data" * 1000, lease)
    await leaf.images.Prune(pb.PruneRequest())
    await leaf.leases.Delete(pb.DeleteLeaseRequest(id="one"))
    assert await blobs(leaf) == {digest(b"data" * 1000)}
    [lease] = (await leaf.leases.List(pb.ListLeasesRequest())).leases
    assert list(lease.resources) == [digest(b"data" * 1000)]
    with pytest.raises(FailedPrecondition, match="lease two"):
        await leaf.content.Delete(pb.DeleteBlobRequest(digest=digest(b"data" * 1000)))
    await leaf.leases.Delete(pb.DeleteLeaseRequest(id="two"))
    assert leaf.disk() == set()


async def test_a_blob_without_a_lease_has_its_time_of_grace(tmp_path: Path) -> None:
    async with images_leaf(tmp_path / "images", blob_grace_s=1) as leaf:
        await write(leaf, b"kept for a while")
        await leaf.leases.Delete(pb.DeleteLeaseRequest(id="none"))
        assert len(await blobs(leaf)) == 1
        await asyncio.sleep(1.01)
        await leaf.leases.Delete(pb.DeleteLeaseRequest(id="none"))
        assert await blobs(leaf) == set()
        await write(leaf, b"removed by prune")
        assert (await leaf.images.Prune(pb.PruneRequest())).reclaimed_bytes == 16
        assert leaf.disk() == set()


async def test_a_blob_written_again_is_one_blob(leaf: ImagesLeaf) -> None:
    first = await write(leaf, b"data")
    assert await write(leaf, b"data") == first
    await leaf.content.Delete(pb.DeleteBlobRequest(digest=first.digest))
    assert leaf.disk() == set()


async def test_what_was_made_under_a_lease_goes_when_its_time_is_over(leaf: ImagesLeaf) -> None:
    await leaf.load(packed({"f": b"x"}), name="x:1")
    before = leaf.disk()
    await create(leaf, "short", 2)
    await write(leaf, b"data", "short")
    await leaf.prepare("c", image="x:1", lease="short")
    await leaf.images.Remove(pb.RemoveImageRequest(name="x:1", force=True))
    assert (await leaf.snapshots.Get(pb.SnapshotRequest(key="c"))).key == "c"
    await until(leaf, disk=set())
    with pytest.raises(NotFound):
        await leaf.snapshots.Get(pb.SnapshotRequest(key="c"))
    assert len((await leaf.leases.List(pb.ListLeasesRequest())).leases) == 0
    assert before != set()


async def test_a_lease_that_ended_while_the_daemon_was_down_ends_at_its_start(tmp_path: Path) -> None:
    async with images_leaf(tmp_path / "images") as leaf:
        await create(leaf, "short", 1)
        await leaf.prepare("c", lease="short")
    await asyncio.sleep(1.05)
    async with images_leaf(tmp_path / "images") as leaf:
        await until(leaf, disk=set())


async def test_the_same_prepare_without_the_lease_hands_the_snapshot_over(leaf: ImagesLeaf) -> None:
    await create(leaf, "work")
    first = await leaf.prepare("c", lease="work")
    assert await leaf.prepare("c") == first
    await leaf.leases.Delete(pb.DeleteLeaseRequest(id="work"))
    await leaf.settled()
    assert (await leaf.snapshots.Get(pb.SnapshotRequest(key="c"))).kind == pb.Snapshot.KIND_ACTIVE


async def test_nothing_is_made_under_a_lease_that_has_ended(leaf: ImagesLeaf) -> None:
    with pytest.raises(NotFound, match="lease 'gone'"):
        await leaf.prepare("c", lease="gone")
    with pytest.raises(NotFound, match="lease 'gone'"):
        await write(leaf, b"data", "gone")
    await leaf.settled()
    assert leaf.disk() == set()
    with pytest.raises(InvalidArgument, match="lease id"):
        await leaf.prepare("c", lease="../x")


async def test_a_committed_snapshot_that_others_lie_on_outlives_its_lease(leaf: ImagesLeaf) -> None:
    await create(leaf, "build")
    await leaf.prepare("step", lease="build")
    await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="step", name="base"))
    await leaf.prepare("c", parent="base")
    await leaf.leases.Delete(pb.DeleteLeaseRequest(id="build"))
    assert len((await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c"))).mounts) == 1
    with pytest.raises(FailedPrecondition, match="'c' lies on it"):
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="base"))
    for key in ("c", "base"):
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=True))
    await leaf.settled()
    assert leaf.disk() == set()
