"""Snapshots over gRPC: what their rows promise, beyond what a driver does."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.file_systems import file_system, mounted_image
from support.images_leaf import ImagesLeaf, images_leaf
from support.requirements import needs
from support.tars import packed

from corral.api.images.v1 import images_pb2 as pb
from corral.rpc.context import in_namespace
from corral.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from corral.store import atomic_write

pytestmark = needs("root", "overlayfs")


@pytest.fixture
async def leaf(tmp_path: Path) -> AsyncIterator[ImagesLeaf]:
    async with images_leaf(tmp_path / "images") as made:
        await made.load(packed({"f": b"x"}), name="base:1")
        yield made


def listing(path: str) -> list[Path]:
    return list(Path(path).iterdir())


async def remove(leaf: ImagesLeaf, key: str, *, must_exist: bool = False) -> None:
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=must_exist))


async def test_prepare_tells_how_to_mount_and_what_the_image_is(leaf: ImagesLeaf) -> None:
    made = await leaf.prepare("c", image="base:1")
    [mount] = made.mounts
    assert (mount.type, mount.source, mount.target) == ("overlay", "overlay", "")
    options = dict(option.split("=", 1) for option in mount.options)
    assert set(options) >= {"lowerdir", "upperdir", "workdir"}
    for value in (options["lowerdir"], options["upperdir"], options["workdir"]):
        listing(value)  # there, and a directory
    assert made.image == await leaf.images.Get(pb.GetImageRequest(name="base:1"))
    assert made.driver == "overlayfs"
    assert list((await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c"))).mounts) == list(made.mounts)


async def test_the_same_prepare_gives_the_same_and_another_is_refused(leaf: ImagesLeaf) -> None:
    first = await leaf.prepare("c", image="base:1")
    assert await leaf.prepare("c", image="base:1") == first
    with pytest.raises(AlreadyExists, match="on another parent"):
        await leaf.prepare("c")
    with pytest.raises(AlreadyExists):
        await leaf.snapshots.View(pb.PrepareSnapshotRequest(key="c", image="base:1"))


@needs("ext4", "mkfs.ext4")
@pytest.mark.parametrize("later", [False, True])
async def test_what_is_synced_in_a_tree_outlives_a_loss_of_power(tmp_path: Path, *, later: bool) -> None:
    """A copy of the device has what was written to it by then, and nothing of what still waits in memory."""
    with file_system("ext4", tmp_path, size_mb=64) as disk:
        async with images_leaf(disk / "images") as leaf:
            await leaf.load(packed({"f": b"x"}), name="base:1")
            request = pb.PrepareSnapshotRequest(key="c", image="base:1", persist_later=later)
            made = await leaf.snapshots.Prepare(request)
            if later:
                await leaf.snapshots.Persist(pb.PersistRequest())
            synced = Path(made.mounts[0].options[1].removeprefix("upperdir="), "synced")
            atomic_write(synced, b"kept")
            await asyncio.to_thread(shutil.copy, tmp_path / "ext4.img", tmp_path / "copy.img")
    with mounted_image(tmp_path / "copy.img", disk):
        async with images_leaf(disk / "images") as leaf:
            await leaf.settled()
            assert (await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c"))).mounts == made.mounts
            assert listing(str(synced.parent)) == [synced]


async def test_many_at_once_of_one_key_are_one(leaf: ImagesLeaf) -> None:
    before = leaf.disk()
    answers = await asyncio.gather(*[leaf.prepare("c", image="base:1") for _ in range(20)])
    assert all(answer == answers[0] for answer in answers)
    await leaf.settled()
    assert len(leaf.disk() - before) == 1
    await asyncio.gather(*[remove(leaf, "c") for _ in range(20)])
    await leaf.settled()
    assert leaf.disk() == before


async def test_remove_is_idempotent_unless_it_must_exist(leaf: ImagesLeaf) -> None:
    await leaf.prepare("c", image="base:1")
    await remove(leaf, "c", must_exist=True)
    await remove(leaf, "c")
    with pytest.raises(NotFound, match="no snapshot 'c'"):
        await remove(leaf, "c", must_exist=True)


async def test_a_removed_key_can_be_used_again_and_is_empty(leaf: ImagesLeaf) -> None:
    first = await leaf.prepare("c", image="base:1")
    upper = first.mounts[0].options[1].removeprefix("upperdir=")
    (Path(upper) / "mine").write_text("x")
    await remove(leaf, "c")
    again = await leaf.prepare("c", image="base:1")
    assert again.mounts != first.mounts
    assert listing(again.mounts[0].options[1].removeprefix("upperdir=")) == []


async def test_keys_are_names_and_nothing_else(leaf: ImagesLeaf) -> None:
    for key in ("", "../x", "a/b", "x" * 129, "-x"):
        with pytest.raises(InvalidArgument, match="snapshot key"):
            await leaf.prepare(key, image="base:1")
    await leaf.prepare("a")
    with pytest.raises(InvalidArgument, match="snapshot name"):
        await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="a", name="../b"))


async def test_a_committed_snapshot_is_its_namespaces_own(leaf: ImagesLeaf) -> None:
    """Else one could put content of one's own under the chain id of somebody's layer."""
    chain_id = (await leaf.images.Get(pb.GetImageRequest(name="base:1"))).chain_id
    with in_namespace("evil"):
        await leaf.prepare("a")
        await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="a", name=chain_id))
    made = await leaf.prepare("c", parent=chain_id)
    lower = made.mounts[0].options[0].removeprefix("lowerdir=")
    assert (Path(lower) / "f").read_text() == "x"
    with in_namespace("evil"):
        await remove(leaf, chain_id, must_exist=True)
    await leaf.prepare("d", parent=chain_id)


async def test_commit_and_what_it_refuses(leaf: ImagesLeaf) -> None:
    await leaf.prepare("a", image="base:1")
    committed = await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="a", name="b"))
    assert (committed.key, committed.kind) == ("b", pb.Snapshot.KIND_COMMITTED)
    for key, kind, why in (("a", NotFound, "no snapshot"), ("b", FailedPrecondition, "only those can be committed")):
        with pytest.raises(kind, match=why):
            await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key=key, name="c"))
    with pytest.raises(FailedPrecondition, match="ask for a view"):
        await leaf.snapshots.Mounts(pb.SnapshotRequest(key="b"))
    await leaf.prepare("a2")
    with pytest.raises(AlreadyExists, match="'b' already exists"):
        await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="a2", name="b"))
    with pytest.raises(FailedPrecondition, match="still being written to"):
        await leaf.prepare("d", parent="a2")
    with pytest.raises(NotFound, match="no committed snapshot"):
        await leaf.prepare("d", parent="nothing")
    assert (await leaf.snapshots.Usage(pb.SnapshotRequest(key="b"))).inodes == 0


async def test_get_and_list_tell_kind_and_parent(leaf: ImagesLeaf) -> None:
    image = await leaf.images.Get(pb.GetImageRequest(name="base:1"))
    await leaf.prepare("c", image="base:1")
    await leaf.snapshots.View(pb.PrepareSnapshotRequest(key="v", image="base:1", labels={"a": "b"}))
    listed = {s.key: s for s in (await leaf.snapshots.List(pb.ListSnapshotsRequest())).snapshots}
    assert set(listed) == {"c", "v", image.chain_id}
    assert listed["c"].parent == listed["v"].parent == image.chain_id
    assert listed["v"].kind == pb.Snapshot.KIND_VIEW
    assert listed["v"].labels == {"a": "b"}
    assert listed[image.chain_id].size_bytes == 1
    assert await leaf.snapshots.Get(pb.SnapshotRequest(key="v")) == listed["v"]
    only = await leaf.snapshots.List(pb.ListSnapshotsRequest(kind=pb.Snapshot.KIND_ACTIVE))
    assert [snapshot.key for snapshot in only.snapshots] == ["c"]


async def test_the_drivers_say_what_they_can(leaf: ImagesLeaf) -> None:
    drivers = {driver.name: driver for driver in (await leaf.snapshots.Drivers(pb.DriversRequest())).drivers}
    assert drivers["overlayfs"].usable
    assert drivers["overlayfs"].is_default


async def test_a_hundred_containers_come_and_go(leaf: ImagesLeaf) -> None:
    before = leaf.disk()

    async def one(i: int) -> None:
        for j in range(5):
            await leaf.prepare(f"c{i}-{j}", image="base:1")
            await remove(leaf, f"c{i}-{j}", must_exist=True)

    await asyncio.gather(*[one(i) for i in range(20)])
    await leaf.settled()
    assert leaf.disk() == before
