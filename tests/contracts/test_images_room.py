"""How much is on disk, what of it could go, and what goes when the disk is full."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from support.images import Entry, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf, images_leaf, lease_metadata
from support.overlay import mounted
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.images.reclaiming import Space
from corral.rpc.context import in_namespace
from corral.rpc.errors import InvalidArgument

pytestmark = needs("root", "overlayfs")

MB = 1 << 20


@pytest.fixture
async def leaf(tmp_path: Path) -> AsyncIterator[ImagesLeaf]:
    async with images_leaf(tmp_path / "images", gc_high_percent=100) as made:
        yield made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """100 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def archive(directory: Path, name: str, *sizes: int, created: str = "") -> Path:
    """An image with a layer of each size, whose content no other image has unless it has the same size and name."""
    layers = [layer([Entry(f"{name.partition(':')[0]}{i}", os.urandom(size))]) for i, size in enumerate(sizes)]
    return write_layers(directory, name, layers, created=created)


def write_layers(directory: Path, name: str, layers: list[bytes], *, created: str = "") -> Path:
    config = image_config(layers)
    if created:
        config = config.replace(b'"created":"2025-01-01T00:00:00Z","arch', f'"created":"{created}","arch'.encode())
    path = directory / f"{name.replace(':', '-')}.tar"
    return write_oci_archive(path, name, layers, config, compress=False)


async def usage(leaf: ImagesLeaf) -> pb.DiskUsageResponse:
    return await leaf.images.DiskUsage(pb.DiskUsageRequest())


async def prune(leaf: ImagesLeaf, **request: object) -> pb.PruneResponse:
    return await leaf.images.Prune(pb.PruneRequest(**request))  # type: ignore[arg-type]


async def events(leaf: ImagesLeaf, topic: str) -> list[types_pb2.Event]:
    request = types_pb2.EventsRequest(no_follow=True, all_namespaces=True, topics=[topic])
    return [event async for answer in leaf.images.Events(request) for event in answer.events]


def blob_bytes(leaf: ImagesLeaf) -> int:
    return sum(path.stat().st_size for path in (leaf.root / "blobs/sha256").iterdir())


# Disk usage


async def test_what_images_share_is_counted_once(leaf: ImagesLeaf, tmp_path: Path) -> None:
    common = layer([Entry("common", os.urandom(300_000))])
    own = [layer([Entry(f"own{i}", os.urandom(100_000))]) for i in range(2)]
    for i in range(2):
        await leaf.load(write_layers(tmp_path, f"i{i}:1", [common, own[i]]))
    found = await usage(leaf)
    assert found.blobs.size_bytes == blob_bytes(leaf)
    assert found.blobs.total == len(list((leaf.root / "blobs/sha256").iterdir()))
    assert found.layers.total == 3
    assert found.layers.size_bytes == 500_000
    assert found.images_size_bytes == found.blobs.size_bytes + found.layers.size_bytes
    assert [list(image.names) for image in found.images] == [["i1:1"], ["i0:1"]]
    for image in found.images:
        assert image.shared_bytes == len(common) + 300_000
        assert image.size_bytes > image.shared_bytes + len(own[0]) + 100_000
    whole = sum(image.size_bytes - image.shared_bytes for image in found.images) + found.images[0].shared_bytes
    assert whole == found.images_size_bytes


async def test_what_is_said_to_be_reclaimable_is_what_prune_reclaims(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await leaf.load(archive(tmp_path, "used:1", 200_000))
    await leaf.load(archive(tmp_path, "idle:1", 100_000, 50_000))
    await leaf.prepare("c", image="used:1")
    await leaf.images.Remove(pb.RemoveImageRequest(name="used:1", force=True))

    async def data() -> AsyncIterator[pb.WriteBlobRequest]:
        yield pb.WriteBlobRequest(data=b"x" * 1000)

    await leaf.content.Write(data())
    part = leaf.root / "partial" / ("0" * 64)
    part.with_suffix(".data").write_bytes(bytes(8192))
    part.with_suffix(".log").write_text("9999\n0 8192\n")
    said = await usage(leaf)
    assert said.blobs.reclaimable_bytes == 1000
    assert said.layers.reclaimable_bytes == 0
    assert said.partials.reclaimable_bytes == said.partials.size_bytes > 8192
    pruned = await prune(leaf, all=True)
    whole = said.images_reclaimable_bytes + said.blobs.reclaimable_bytes + said.partials.reclaimable_bytes
    assert pruned.reclaimed_bytes == whole
    after = await usage(leaf)
    assert (after.images_size_bytes, after.blobs.total, after.layers.total) == (0, 0, 1)


async def test_a_container_s_tree_counts_as_what_it_holds_now(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await leaf.load(archive(tmp_path, "x:1", 1000))
    made = await leaf.prepare("c", image="x:1")
    with mounted(made.mounts, tmp_path / "m") as root:
        (root / "mine").write_bytes(bytes(MB))
    [tree] = (await usage(leaf)).snapshots
    assert (tree.key, tree.size_bytes) == ("c", MB)
    [image] = (await usage(leaf)).images
    assert list(image.snapshots) == ["c"]


async def test_images_of_another_namespace_are_not_told_of(leaf: ImagesLeaf, tmp_path: Path) -> None:
    with in_namespace("other"):
        await leaf.load(archive(tmp_path, "x:1", 1000))
    found = await usage(leaf)
    assert not found.images
    assert found.images_size_bytes == found.images_reclaimable_bytes == 0
    assert found.blobs.active == found.blobs.total == 3


# Prune


async def test_prune_leaves_alone_what_is_younger_than_asked_for(leaf: ImagesLeaf, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    await leaf.load(archive(tmp_path, "old:1", 1000))
    await leaf.load(archive(tmp_path, "new:1", 1000, created=now.strftime("%Y-%m-%dT%H:%M:%SZ")))
    until = Timestamp()
    until.FromDatetime(now - timedelta(hours=1))
    pruned = await prune(leaf, all=True, until=until)
    assert list(pruned.untagged) == ["docker.io/library/old:1"]
    assert await leaf.names() == ["new:1"]


async def test_prune_leaves_alone_what_a_lease_holds(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await leaf.leases.Create(pb.CreateLeaseRequest(id="mine", ttl=Duration(seconds=60)))
    await leaf.load(archive(tmp_path, "held:1", 1000), metadata=lease_metadata("mine"))
    await leaf.load(archive(tmp_path, "idle:1", 1000))
    assert list((await prune(leaf, all=True)).untagged) == ["docker.io/library/idle:1"]
    await leaf.leases.Delete(pb.DeleteLeaseRequest(id="mine"))
    assert list((await prune(leaf, all=True)).untagged) == ["docker.io/library/held:1"]


async def test_what_is_collected_is_journalled(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await leaf.load(archive(tmp_path, "x:1", 1000))
    pruned = await prune(leaf, all=True)
    [event] = await events(leaf, "content.collected")
    assert dict(event.payload.items()) == {"blobs": 3, "layers": 1, "bytes": pruned.reclaimed_bytes}


# Marks


def test_space_is_reckoned_as_df_does() -> None:
    space = Space(used_bytes=60, available_bytes=40)
    assert space.used_percent == 60
    assert [space.above(percent) for percent in (100, 60, 59, 0)] == [0, 0, 1, 60]
    assert Space(0, 0).used_percent == 0


@pytest.mark.parametrize("marks", [(80, 90), (101, 90), (50, -1)])
async def test_marks_that_cannot_be_are_refused(tmp_path: Path, marks: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match="low one not above the high one"):
        async with images_leaf(tmp_path / "images", gc_high_percent=marks[0], gc_low_percent=marks[1]):
            pass


def percent_used(path: Path) -> float:
    found = os.statvfs(path)
    return 100 * (found.f_blocks - found.f_bavail) / found.f_blocks


async def test_a_full_disk_loses_the_longest_unused_images_until_the_low_mark(small_disk: Path, tmp_path: Path) -> None:
    marks = {"gc_high_percent": 70, "gc_low_percent": 50, "gc_min_age_s": 0, "gc_interval_s": 3600}
    async with images_leaf(small_disk / "images", **marks) as leaf:
        for name in ("a:1", "b:1", "c:1"):  # 10 MB each, as blob and unpacked
            await leaf.load(archive(tmp_path, name, 5 * MB))
        await leaf.prepare("one", image="a:1")
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="one"))  # so b is the longest unused
        await leaf.prepare("two", image="c:1")
        assert await leaf.names() == ["a:1", "b:1", "c:1"]
        (small_disk / "others").write_bytes(bytes(25 * MB))
        await leaf.load(archive(tmp_path, "d:1", 10 * MB))  # 75 %
        for _ in range(200):
            if percent_used(small_disk) <= 50:
                break
            await asyncio.sleep(0.02)
        assert percent_used(small_disk) <= 50
        # Not enough went with b, and with a; then d, though new, as nobody uses it. c has a container.
        assert await leaf.names() == ["c:1"]
        removed = await events(leaf, "image.removed")
        assert [event.subject.rpartition("/")[2] for event in removed] == ["b:1", "a:1", "d:1"]
        assert removed[0].payload["reason"] == "the disk was above 70 %"


async def test_a_full_disk_takes_nothing_that_is_used_leased_pulled_or_young(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "others").write_bytes(bytes(80 * MB))
    marks = {"gc_high_percent": 50, "gc_low_percent": 10, "gc_interval_s": 3600}
    async with images_leaf(small_disk / "images", **marks, gc_min_age_s=0) as leaf:
        reclaimer = leaf.service._reclaimer
        await leaf.leases.Create(pb.CreateLeaseRequest(id="mine", ttl=Duration(seconds=60)))
        leaf.service._collector.on_growth = lambda: None
        await leaf.load(archive(tmp_path, "leased:1", 1000), metadata=lease_metadata("mine"))
        await leaf.load(archive(tmp_path, "used:1", 1000))
        await leaf.prepare("c", image="used:1")
        [pulled] = await leaf.load(archive(tmp_path, "pulled:1", 1000))
        async with leaf.service._collector.pinned([pulled.target.digest]):
            assert await reclaimer.run() == []
        assert [record.name for record in await reclaimer.run()] == ["docker.io/library/pulled:1"]
    async with images_leaf(small_disk / "images", **marks, gc_min_age_s=60) as leaf:
        leaf.service._collector.on_growth = lambda: None
        await leaf.load(archive(tmp_path, "young:1", 1000))
        assert await leaf.service._reclaimer.run() == []
        assert await leaf.names() == ["leased:1", "used:1", "young:1"]


async def test_rests_of_interrupted_pulls_go_last(small_disk: Path, tmp_path: Path) -> None:
    marks = {"gc_high_percent": 70, "gc_low_percent": 55, "gc_min_age_s": 0, "gc_interval_s": 3600}
    async with images_leaf(small_disk / "images", **marks) as leaf:
        leaf.service._collector.on_growth = lambda: None
        await leaf.load(archive(tmp_path, "x:1", 10 * MB))
        part = leaf.root / "partial" / ("0" * 64)
        part.with_suffix(".data").write_bytes(bytes(20 * MB))
        part.with_suffix(".log").write_text(f"{30 * MB}\n0 {20 * MB}\n")
        (small_disk / "others").write_bytes(bytes(33 * MB))
        assert [record.name for record in await leaf.service._reclaimer.run()] == ["docker.io/library/x:1"]
        assert part.with_suffix(".data").exists()
        (small_disk / "more").write_bytes(bytes(20 * MB))
        assert await leaf.service._reclaimer.run() == []
        assert not part.with_suffix(".data").exists()
