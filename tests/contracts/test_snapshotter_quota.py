"""Writable trees that are bounded, with every driver that can bound one here."""

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.file_systems import SIMPLE_QUOTAS, FileSystems, lacking_file_system, loop_devices
from support.images import Entry, image_config, layer, write_docker_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.requirements import needs
from support.snapshotters import CASES, case_id, driver_at, place_for

from corral.api.images.v1 import images_pb2 as pb
from corral.engine import bounded_volumes
from corral.kernel import capabilities
from corral.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from corral.store import bounded as bounded_files

pytestmark = needs("root")

QUOTA = 16 << 20
COUNTING = (
    ("overlayfs", "ext4-projects"),
    ("overlayfs", "xfs-projects"),
    ("native", "xfs-projects"),
    ("aufs", "ext4-projects"),
    ("btrfs", SIMPLE_QUOTAS),
)


@pytest.fixture(params=(*CASES, *COUNTING), ids=case_id)
async def leaf(request: pytest.FixtureRequest, tmp_path: Path, file_systems: FileSystems) -> AsyncIterator[ImagesLeaf]:
    name, place = request.param[0], place_for(request.param, tmp_path, file_systems)
    layers = [layer([Entry("base", bytes(1 << 20))])]
    archive = write_docker_archive(tmp_path / "i.tar", "i:1", layers, image_config(layers))
    async with images_leaf(place / "root", driver=name) as made:
        await made.load(archive)
        if reason := driver_at(name, place / "root").check_quota():
            with pytest.raises(FailedPrecondition, match="cannot bound a writable tree here"):
                await bounded(made, "c")
            assert "prjquota" in reason or "btrfs quota enable --simple" in reason
            pytest.skip(f"{name}: needs {'simple' if name == 'btrfs' else 'project'} quota")
        yield made


async def bounded(leaf: ImagesLeaf, key: str, quota: int = QUOTA, **fields: str) -> pb.PrepareSnapshotResponse:
    return await leaf.snapshots.Prepare(pb.PrepareSnapshotRequest(key=key, quota_bytes=quota, **fields))  # type: ignore[arg-type]


@contextmanager
def as_a_container() -> Iterator[None]:
    """Without the capability that lifts the limits of ext4, which containers do not have unless privileged."""
    effective, permitted = capabilities.effective(), capabilities.permitted()
    less = effective & ~(1 << capabilities.SYS_RESOURCE)
    capabilities.set_process(effective=less, permitted=permitted, inheritable=0)
    try:
        yield
    finally:
        capabilities.set_process(effective=effective, permitted=permitted, inheritable=0)


def fill(path: Path, most: int) -> int:
    """Write until it is refused for want of room, or so much was written; returns how much."""
    written = 0
    with as_a_container(), path.open("wb", buffering=0) as file:
        try:
            while written < most:
                written += file.write(bytes(1 << 20))
                os.fsync(file.fileno())
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
    return written


async def test_who_writes_past_it_is_refused_and_its_neighbours_are_not(leaf: ImagesLeaf, tmp_path: Path) -> None:
    made = await bounded(leaf, "c", image="i:1")
    neighbour = await leaf.prepare("n", image="i:1")
    other = await bounded(leaf, "o", image="i:1")
    with mounted(made.mounts, tmp_path / "c") as c, mounted(neighbour.mounts, tmp_path / "n") as n:
        assert (c / "base").stat().st_size == 1 << 20
        assert QUOTA // 2 < fill(c / "f", 4 * QUOTA) <= QUOTA
        assert fill(n / "f", 3 * QUOTA) == 3 * QUOTA
        with mounted(other.mounts, tmp_path / "o") as o:
            assert fill(o / "f", QUOTA // 4) == QUOTA // 4
        usage = await leaf.snapshots.Usage(pb.SnapshotRequest(key="c"))
        assert QUOTA // 2 < usage.size_bytes <= QUOTA + (1 << 20)
        (c / "f").unlink()
        assert fill(c / "g", QUOTA // 4) == QUOTA // 4
    assert (await leaf.snapshots.Get(pb.SnapshotRequest(key="c"))).quota_bytes == QUOTA
    for key in ("c", "n", "o"):
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=True))
    await leaf.settled()
    assert await devices_of(leaf.root) == []


@pytest.mark.parametrize("kind", ["ext4-projects", "xfs-projects"])
def test_a_directory_has_a_limit_of_its_own_until_it_is_released(kind: str, file_systems: FileSystems) -> None:
    if reason := lacking_file_system(kind):
        pytest.skip(reason)
    one, two = (file_systems.place(kind) for _ in range(2))
    for place in (one, two):
        bounded_files.bound_project(place, QUOTA)
    first, second = bounded_files.project_usage(one), bounded_files.project_usage(two)
    assert first is not None
    assert second is not None
    assert first.limit_bytes == second.limit_bytes == QUOTA
    (one / "d").mkdir()
    (one / "d/f").write_bytes(bytes(1 << 20))
    os.sync()
    used = bounded_files.project_usage(one)
    assert used is not None
    assert used.used_bytes >= 1 << 20
    assert used.inodes >= 3
    bounded_files.release_project(one)
    freed = bounded_files.project_usage(one)
    assert freed is not None
    assert freed.limit_bytes == 0


async def devices_of(root: Path) -> list[str]:
    """The files below it that still are loop devices after a while, but for those of a pool, which stays."""
    for _ in range(100):
        if not (left := [path for path in loop_devices(root) if "/devicemapper/" not in path]):
            break
        await asyncio.sleep(0.02)
    return left


async def test_what_was_written_is_kept_and_can_be_built_on(leaf: ImagesLeaf, tmp_path: Path) -> None:
    made = await bounded(leaf, "c", image="i:1")
    with mounted(made.mounts, tmp_path / "m") as root:
        (root / "mine").write_text("x")
        (root / "base").unlink()
    assert list((await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c"))).mounts) == list(made.mounts)
    with mounted(made.mounts, tmp_path / "m") as root:
        assert (root / "mine").read_text() == "x"
    await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="c", name="stage"))
    for make in (leaf.prepare, leaf.view):
        above = await make(make.__name__, parent="stage")
        with mounted(above.mounts, tmp_path / "m") as root:
            assert {path.name for path in root.iterdir()} == {"mine"}
    above = await leaf.prepare("free", parent="stage")
    with mounted(above.mounts, tmp_path / "m") as root:
        assert fill(root / "f", 2 * QUOTA) == 2 * QUOTA


async def test_on_nothing(leaf: ImagesLeaf, tmp_path: Path) -> None:
    made = await bounded(leaf, "c")
    with mounted(made.mounts, tmp_path / "m") as root:
        assert list(root.iterdir()) == []
        assert fill(root / "f", 4 * QUOTA) <= QUOTA


async def test_what_makes_no_sense_is_refused(leaf: ImagesLeaf) -> None:
    with pytest.raises(InvalidArgument, match="at least 4 MiB"):
        await bounded(leaf, "c", 1000)
    with pytest.raises(InvalidArgument, match="a writable tree"):
        await leaf.snapshots.View(pb.PrepareSnapshotRequest(key="v", image="i:1", quota_bytes=QUOTA))
    await bounded(leaf, "c")
    with pytest.raises(AlreadyExists, match="another quota"):
        await bounded(leaf, "c", 2 * QUOTA)
    await bounded(leaf, "c")


def written_to_subvolumes(root: Path) -> int:
    """How much fits into subvolumes of one's own, side by side, in each other, and copied."""
    for words in (("create", root / "one"), ("create", root / "one/two"), ("snapshot", root / "one", root / "three")):
        subprocess.run(["btrfs", "-q", "subvolume", *words], check=True)
    written = 0
    for each in ("one", "one/two", "three", "."):
        with suppress(OSError):  # not even an empty file is left
            written += fill(root / each / "f", 2 * QUOTA)
    return written


@needs("btrfs-quotas")
async def test_a_container_does_not_leave_its_quota_by_making_subvolumes(
    tmp_path: Path, file_systems: FileSystems
) -> None:
    place = place_for(("btrfs", SIMPLE_QUOTAS), tmp_path, file_systems)
    async with images_leaf(place / "root", driver="btrfs") as leaf:
        made = await bounded(leaf, "c")
        with mounted(made.mounts, tmp_path / "m") as root:
            written = written_to_subvolumes(root)
        assert 0 < written <= QUOTA
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c", must_exist=True))
        await leaf.settled()
        again = await bounded(leaf, "d")
        with mounted(again.mounts, tmp_path / "m") as root:
            assert fill(root / "f", QUOTA // 2) == QUOTA // 2


@needs("btrfs-quotas")
@pytest.mark.parametrize("kind", ["btrfs", SIMPLE_QUOTAS])
def test_a_volume_on_btrfs_is_not_left_either(kind: str, file_systems: FileSystems) -> None:
    """Without simple quotas it is a file system in a file."""
    directory = file_systems.place(kind) / "v"
    data = bounded_volumes.ready(directory, {"size": str(QUOTA)})
    assert (directory / "image").exists() == (kind == "btrfs")
    try:
        if kind == SIMPLE_QUOTAS:
            assert 0 < written_to_subvolumes(data) <= QUOTA
        else:
            assert 0 < fill(data / "f", 2 * QUOTA) <= QUOTA
    finally:
        bounded_volumes.remove(directory)
    assert not directory.exists()
