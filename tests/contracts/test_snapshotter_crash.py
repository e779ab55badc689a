"""Killed at every step of every snapshot driver: disk and database agree afterwards, and nothing else is left."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from support.corrald import PATIENCE, Corrald, PlaceOn
from support.file_systems import SIMPLE_QUOTAS, FileSystems
from support.images import Entry, image_config, layer, write_docker_archive
from support.images_leaf import ImagesLeaf
from support.overlay import mounted
from support.requirements import needs
from support.snapshotters import CASES, driver_at, place_for

import corral.images.drivers
from corral.api.images.v1 import images_pb2 as pb
from corral.images.snapshotter import Snapshotter
from corral.rpc.channel import open_channel
from corral.rpc.errors import AlreadyExists, FailedPrecondition, Unavailable

pytestmark = needs("root")

SOURCES = Path(corral.images.drivers.__file__).parent
CALL = re.compile(r'\bfailpoint\("([^"]*)"\)')


# Only where projects are counted.
ELSEWHERE = frozenset(("images.native.after_quota",))


def steps() -> Iterator[tuple[str, str, str]]:
    """Driver, file system and failpoint: those in the driver's own module."""
    first = dict(reversed(CASES))
    for name, kind in first.items():
        for failpoint in sorted(set(CALL.findall((SOURCES / f"{name.replace('-', '_')}.py").read_text())) - ELSEWHERE):
            counts = failpoint == "images.btrfs.after_quota"
            yield name, SIMPLE_QUOTAS if counts else kind, failpoint


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    layers = [layer([Entry(f"d{i}/f", bytes(50_000))]) for i in range(2)]
    layers.append(layer([Entry("d0/.wh.f"), Entry("d1/g", b"g")]))
    return write_docker_archive(tmp_path / "x.tar", "x:1", layers, image_config(layers))


@asynccontextmanager
async def serving(daemon: Corrald, failpoint: str = "") -> AsyncIterator[ImagesLeaf]:
    """Start the daemon, to be killed at `failpoint`, and talk to it."""
    daemon.start(environment={"CORRAL_FAILPOINTS": f"{failpoint}=kill" if failpoint else ""})
    channel = open_channel(daemon.address_of("images"))
    try:
        yield ImagesLeaf(channel, daemon.root / "images")
    finally:
        await channel.close()


async def live(leaf: ImagesLeaf, archive: Path, at: Path) -> None:
    """Whatever a driver can be asked; it may be done again after any part of it."""
    await leaf.load(archive)
    made = await leaf.prepare("c", image="x:1")
    with mounted(made.mounts, at) as root:
        assert not (root / "d0/f").exists()
        (root / "mine").write_text("x")
    with suppress(AlreadyExists):
        await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="c", name="base"))
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c"))
    with suppress(FailedPrecondition):  # not every driver can bound a tree here
        await bounded(leaf, at)
    await leaf.prepare("d", parent="base")
    await leaf.view("v", image="x:1")
    for key in ("d", "v"):
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=True))


async def bounded(leaf: ImagesLeaf, at: Path) -> None:
    made = await leaf.snapshots.Prepare(pb.PrepareSnapshotRequest(key="q", quota_bytes=8 << 20, image="x:1"))
    with mounted(made.mounts, at) as root:
        (root / "mine").write_text("q")
    with suppress(AlreadyExists):
        await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="q", name="bounded"))
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="q"))
    made = await leaf.prepare("above", parent="bounded")
    with mounted(made.mounts, at) as root:
        assert (root / "mine").read_text() == "q"
    for key in ("above", "bounded"):
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=True))


@pytest.mark.parametrize(("name", "kind", "failpoint"), list(steps()))
async def test_killed_there_nothing_is_left_and_all_can_be_done(
    name: str, kind: str, failpoint: str, archive: Path, tmp_path: Path, file_systems: FileSystems
) -> None:
    place = PlaceOn.make_on(place_for((name, kind), tmp_path, file_systems))
    settings = {"images": {"driver": name}}
    with Corrald(place=place, services=("images",), private_names=False, settings=settings) as daemon:
        async with serving(daemon, failpoint) as leaf:
            with pytest.raises(Unavailable):
                await live(leaf, archive, tmp_path / "m")
            await asyncio.to_thread(daemon.processes["corrald"].wait, 10 * PATIENCE)
        daemon.processes.clear()
        async with serving(daemon) as leaf:
            await live(leaf, archive, tmp_path / "m")
            made = await leaf.prepare("e", parent="base")
            with mounted(made.mounts, tmp_path / "m") as root:
                assert (root / "mine").read_text() == "x"
                assert not (root / "d0/f").exists()
                assert (root / "d1/g").read_text() == "g"
            assert await agreed(leaf, driver_at(name, leaf.root)) > 0
            for key in ("e", "base"):
                await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=True))
            await leaf.images.Remove(pb.RemoveImageRequest(name="x:1"))
            assert await agreed(leaf, driver_at(name, leaf.root)) == 0


async def agreed(leaf: ImagesLeaf, driver: Snapshotter) -> int:
    """How many trees are on disk, once they are as many as the service says; removal goes on beside the requests."""
    described = len((await leaf.snapshots.List(pb.ListSnapshotsRequest())).snapshots)
    for _ in range(int(200 * PATIENCE)):
        if len(trees(leaf, driver)) == described:
            break
        await asyncio.sleep(0.05)
    assert len(trees(leaf, driver)) == described
    return described


def trees(leaf: ImagesLeaf, driver: Snapshotter) -> set[int]:
    """Without those that were made ahead."""
    return {int(tree) for tree in driver.trees()} - {int(path.name) for path in leaf.root.glob("*/r/*")}
