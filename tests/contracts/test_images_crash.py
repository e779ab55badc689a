"""Killed at every step that changes the world, and started again: all of it is there, or nothing, and no leftovers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from support.corrald import Corrald
from support.images import Entry, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf
from support.overlay import mounted
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.rpc.channel import open_channel
from corral.rpc.errors import CorralError, NotFound, Unavailable

pytestmark = needs("root", "overlayfs")

IMPORT_STEPS = (
    "images.import.after_intake",
    "images.unpack.after_sync",
    "images.admit.before_commit",
    "store.before_commit",
    "store.after_commit",
    "images.admit.after_commit",
)
type Work = Callable[[ImagesLeaf], Awaitable[object]]


@pytest.fixture
def daemon() -> Iterator[Corrald]:
    """The images leaf alone, for a test that kills it."""
    with Corrald(services=("images",), private_names=False) as corrald:
        yield corrald


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    layers = [layer([Entry(f"f{i}", bytes(50_000))]) for i in range(3)]
    return write_oci_archive(tmp_path / "x.tar", "x:1", layers, image_config(layers))


@asynccontextmanager
async def serving(daemon: Corrald, failpoint: str = "") -> AsyncIterator[ImagesLeaf]:
    """Start the daemon, to be killed at `failpoint`, and talk to it."""
    # The start collects what it finds, with one transaction: these points are passed once before any call.
    hit = "@2" if failpoint.startswith(("store.", "images.collect.")) else ""
    daemon.start(environment={"CORRAL_FAILPOINTS": f"{failpoint}=kill{hit}" if failpoint else ""})
    channel = open_channel(daemon.address_of("images"))
    try:
        yield ImagesLeaf(channel, daemon.root / "images")
    finally:
        await channel.close()


async def killed(daemon: Corrald, failpoint: str, work: Work) -> None:
    """Do `work`, during which the daemon dies."""
    async with serving(daemon, failpoint) as leaf:
        with pytest.raises(Unavailable):
            await work(leaf)
        await asyncio.to_thread(daemon.processes["corrald"].wait, 10)
    daemon.processes.clear()


async def described(leaf: ImagesLeaf) -> set[str]:
    """What has to be on disk, by what the service says that it has."""
    blobs = {f"blobs/sha256/{blob.digest[7:]}" async for blob in leaf.content.List(pb.ListBlobsRequest())}
    found = await leaf.snapshots.List(pb.ListSnapshotsRequest())
    kinds = [snapshot.kind for snapshot in found.snapshots]
    layers, active = kinds.count(pb.Snapshot.KIND_COMMITTED), kinds.count(pb.Snapshot.KIND_ACTIVE)
    return blobs | {f"layer {i}" for i in range(layers)} | {f"active {i}" for i in range(active)}


def on_disk(leaf: ImagesLeaf) -> set[str]:
    disk = leaf.disk()
    layers = sum(path.startswith("overlay/l/") for path in disk)
    active = sum(path.startswith("overlay/s/") for path in disk)
    rest = {path for path in disk if not path.startswith(("overlay/l/", "overlay/s/"))}
    return rest | {f"layer {i}" for i in range(layers)} | {f"active {i}" for i in range(active)}


async def check(leaf: ImagesLeaf) -> None:
    """Disk and database agree, once what goes on in the background is done."""
    found = await leaf.images.Check(types_pb2.CheckRequest())
    assert list(found.findings) == []
    for _ in range(200):
        if on_disk(leaf) == await described(leaf):
            return
        await asyncio.sleep(0.02)
    assert on_disk(leaf) == await described(leaf)


@pytest.mark.parametrize("failpoint", IMPORT_STEPS)
async def test_an_import_is_all_or_nothing(daemon: Corrald, archive: Path, failpoint: str, tmp_path: Path) -> None:
    await killed(daemon, failpoint, lambda leaf: leaf.load(archive))
    async with serving(daemon) as leaf:
        await check(leaf)
        names = await leaf.names()
        assert names in ([], ["x:1"])
        assert (names == ["x:1"]) == (failpoint in ("store.after_commit", "images.admit.after_commit"))
        if not names:
            assert leaf.disk() == set()
        await leaf.load(archive)
        made = await leaf.prepare("c", image="x:1")
        with mounted(made.mounts, tmp_path / "m") as root:
            assert len(list(root.iterdir())) == 3
        await check(leaf)


@pytest.mark.parametrize("failpoint", ["images.unpack.after_sync", "images.unpack.before_commit"])
async def test_the_unpacking_for_a_first_container_is_all_or_nothing(
    daemon: Corrald, archive: Path, failpoint: str
) -> None:
    async with serving(daemon) as leaf:
        await leaf.load(archive, no_unpack=True)
    daemon.stop()
    await killed(daemon, failpoint, lambda leaf: leaf.prepare("c", image="x:1"))
    async with serving(daemon) as leaf:
        await check(leaf)
        assert not any(path.startswith("overlay/") for path in leaf.disk())
        await leaf.prepare("c", image="x:1")
        await check(leaf)


@pytest.mark.parametrize(
    "failpoint", ["images.prepare.before_row", "store.before_commit", "store.after_commit", "images.prepare.after_row"]
)
async def test_a_prepare_is_all_or_nothing(daemon: Corrald, archive: Path, failpoint: str) -> None:
    async with serving(daemon) as leaf:
        await leaf.load(archive)
    daemon.stop()
    await killed(daemon, failpoint, lambda leaf: leaf.prepare("c", image="x:1"))
    async with serving(daemon) as leaf:
        await check(leaf)
        found = None
        with suppress(NotFound):
            found = await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c"))
        assert (found is not None) == failpoint.endswith(("after_commit", "after_row"))
        made = await leaf.prepare("c", image="x:1")
        assert found is None or list(found.mounts) == list(made.mounts)
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c", must_exist=True))
        await check(leaf)


@pytest.mark.parametrize("failpoint", ["store.before_commit", "images.remove.after_row"])
async def test_a_removal_is_all_or_nothing(daemon: Corrald, archive: Path, failpoint: str) -> None:
    async with serving(daemon) as leaf:
        await leaf.load(archive)
        await leaf.prepare("c", image="x:1")
    daemon.stop()
    await killed(daemon, failpoint, lambda leaf: leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c")))
    async with serving(daemon) as leaf:
        await check(leaf)
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c"))
        await check(leaf)
        assert not any(path.startswith("overlay/s/") for path in leaf.disk())


@pytest.mark.parametrize("failpoint", ["store.before_commit", "images.commit.after_row", "store.after_commit"])
async def test_a_commit_is_all_or_nothing(daemon: Corrald, archive: Path, failpoint: str, tmp_path: Path) -> None:
    async with serving(daemon) as leaf:
        await leaf.load(archive)
        made = await leaf.prepare("c", image="x:1")
        with mounted(made.mounts, tmp_path / "m") as root:
            (root / "mine").write_text("x")
    daemon.stop()
    await killed(daemon, failpoint, lambda leaf: leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="c", name="base")))
    async with serving(daemon) as leaf:
        await check(leaf)
        with suppress(NotFound):
            await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="c", name="base"))
        made = await leaf.prepare("d", parent="base")
        with mounted(made.mounts, tmp_path / "m") as root:
            assert (root / "mine").read_text() == "x"
        await check(leaf)


@pytest.mark.parametrize(
    "failpoint",
    ["store.before_commit", "images.image_remove.after_row", "store.after_commit", "images.collect.after_rows"],
)
async def test_an_image_is_removed_with_all_of_it_or_not(daemon: Corrald, archive: Path, failpoint: str) -> None:
    async with serving(daemon) as leaf:
        await leaf.load(archive)
    daemon.stop()
    await killed(daemon, failpoint, lambda leaf: leaf.images.Remove(pb.RemoveImageRequest(name="x:1")))
    async with serving(daemon) as leaf:
        await check(leaf)
        if failpoint != "store.before_commit":
            assert leaf.disk() == set()
        with suppress(CorralError):
            await leaf.images.Remove(pb.RemoveImageRequest(name="x:1"))
        await check(leaf)
        assert leaf.disk() == set()


@pytest.mark.parametrize("failpoint", ["store.before_commit", "store.after_commit", "images.tag.after_row"])
async def test_a_name_is_given_or_not(daemon: Corrald, archive: Path, failpoint: str) -> None:
    tag = pb.TagImageRequest(source="x:1", target="y:2")
    async with serving(daemon) as leaf:
        await leaf.load(archive)
    daemon.stop()
    await killed(daemon, failpoint, lambda leaf: leaf.images.Tag(tag))
    async with serving(daemon) as leaf:
        await check(leaf)
        assert await leaf.names() == (["x:1"] if failpoint == "store.before_commit" else ["x:1", "y:2"])
        await leaf.images.Tag(tag)
        await check(leaf)


@pytest.mark.parametrize("failpoint", ["images.prune.after_rows", "images.collect.after_rows", "store.after_commit"])
async def test_a_prune_is_all_or_nothing(daemon: Corrald, archive: Path, failpoint: str) -> None:
    async with serving(daemon) as leaf:
        await leaf.load(archive)
    daemon.stop()
    await killed(daemon, failpoint, lambda leaf: leaf.images.Prune(pb.PruneRequest(all=True)))
    async with serving(daemon) as leaf:
        await check(leaf)
        assert await leaf.names() == []
        assert leaf.disk() == set()


@pytest.mark.parametrize("failpoint", ["images.recipe.before_row", "images.recipe.after_row"])
async def test_a_blob_is_kept_or_can_be_made_again(daemon: Corrald, archive: Path, failpoint: str) -> None:
    async with serving(daemon, failpoint) as leaf:
        with pytest.raises(Unavailable):
            await leaf.load(archive, keep_blobs=False)
        await asyncio.to_thread(daemon.processes["corrald"].wait, 10)
    daemon.processes.clear()
    async with serving(daemon) as leaf:
        assert list((await leaf.images.Check(types_pb2.CheckRequest())).findings) == []
        assert await leaf.names() == ["x:1"]
        image = await leaf.images.Get(pb.GetImageRequest(name="x:1"))
        there = {path.name for above in ("blobs/sha256", "recipes") for path in (leaf.root / above).iterdir()}
        assert len(there) == 5  # none is there twice
        for one in image.layers:
            request = pb.ReadBlobRequest(digest=one.blob.digest)
            data = b"".join([chunk.data async for chunk in leaf.content.Read(request)])
            assert len(data) == one.blob.size_bytes


# Of collections: one is of the start, one of the look at the disk, and then there is one for each image that goes.
@pytest.mark.parametrize("failpoint", ["images.collect.after_rows=kill@2", "images.collect.after_rows=kill@3"])
async def test_making_room_is_all_or_nothing(archive: Path, failpoint: str, tmp_path: Path) -> None:
    full = {"gc_high_percent": 0, "gc_low_percent": 0, "gc_min_age_s": 0, "gc_interval_s": 3600}
    with Corrald(services=("images",), private_names=False, settings={"images": full}) as daemon:
        daemon.start(environment={"CORRAL_FAILPOINTS": failpoint})
        channel = open_channel(daemon.address_of("images"))
        leaf = ImagesLeaf(channel, daemon.root / "images")
        with suppress(CorralError):
            await leaf.load(archive)
        await channel.close()
        await asyncio.to_thread(daemon.processes["corrald"].wait, 10)
        daemon.processes.clear()
        daemon.settings = {"images": {"gc_high_percent": 100}}
        async with serving(daemon) as leaf:
            await check(leaf)
            assert await leaf.names() == (["x:1"] if failpoint.endswith("@2") else [])


@pytest.mark.parametrize("failpoint", ["images.write.before_row", "store.before_commit", "store.after_commit"])
async def test_a_blob_is_written_whole_or_not(daemon: Corrald, failpoint: str) -> None:
    async def requests() -> AsyncIterator[pb.WriteBlobRequest]:
        yield pb.WriteBlobRequest(data=b"data")

    async def write(leaf: ImagesLeaf) -> object:
        return await leaf.content.Write(requests())

    await killed(daemon, failpoint, write)
    async with serving(daemon) as leaf:
        await check(leaf)
        await write(leaf)
        await check(leaf)
