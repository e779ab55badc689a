"""What is found that does not fit together in the images leaf, and how it is put right."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.file_systems import FileSystems
from support.images import Entry, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.requirements import needs
from support.snapshotters import CASES, case_id, place_for

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.images.snapshotter import TreeId
from corral.images.trees import of_all
from corral.rpc import checking
from corral.rpc.context import in_namespace
from corral.rpc.errors import NotFound

pytestmark = needs("root", "overlayfs")

HEX = "0" * 64
PAUSES_S = checking.PAUSES_S


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is looked for again soon: nothing here is on its way, unless a test says so."""
    monkeypatch.setattr(checking, "PAUSES_S", (0.01, 0.05))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two layers."""
    layers = [layer([Entry(f"f{i}", bytes([i]) * 5000)]) for i in range(2)]
    return write_oci_archive(tmp_path / "x.tar", "x:1", layers, image_config(layers))


async def check(leaf: ImagesLeaf, *, repair: bool = False) -> list[types_pb2.Finding]:
    return list((await leaf.images.Check(types_pb2.CheckRequest(repair=repair))).findings)


async def found(leaf: ImagesLeaf) -> list[str]:
    return [f"{finding.subject} {finding.problem}" for finding in await check(leaf)]


async def repaired(leaf: ImagesLeaf) -> list[str]:
    """What was found; all of it is put right, and nothing new found after it."""
    findings = await check(leaf, repair=True)
    assert [finding for finding in findings if not finding.repaired] == []
    assert await check(leaf) == []
    return [f"{finding.subject} {finding.problem}" for finding in findings]


async def test_nothing_is_found_in_a_leaf_that_is_in_use(leaf: ImagesLeaf, archive: Path) -> None:
    assert await check(leaf) == []
    await leaf.load(archive)
    await leaf.prepare("c", image="x:1")
    await leaf.view("v", image="x:1")
    await leaf.prepare("step", image="x:1")
    await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="step", name="stage"))
    assert await check(leaf) == []


@pytest.mark.parametrize("case", CASES, ids=case_id)
async def test_every_driver_is_checked(
    case: tuple[str, str], archive: Path, tmp_path: Path, file_systems: FileSystems
) -> None:
    """In use nothing is found; a tree without a row is; and a lost layer is unpacked again, a lost tree made again."""
    root = place_for(case, tmp_path, file_systems) / "images"
    async with images_leaf(root, driver=case[0]) as leaf:
        await leaf.load(archive)
        for key in ("c", "step"):
            await leaf.prepare(key, image="x:1")
        await leaf.view("v", image="x:1")
        await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="step", name="stage"))
        made = await leaf.prepare("d", parent="stage")
        assert await check(leaf) == []
        driver = leaf.service._drivers.default
        driver.stage(TreeId(9000))
        assert await repaired(leaf) == [f"tree 9000 of {case[0]} belongs to no snapshot"]
        for record in leaf.service._database.read_sync(of_all):
            if record.key != "stage":
                driver.remove(record.id)
        lost = [line for line in await repaired(leaf) if line.endswith("has lost its tree")]
        assert sum(line.startswith("layer") for line in lost) == 2
        assert {"snapshot default/c has lost its tree", "snapshot default/d has lost its tree"} < set(lost)
        with mounted(made.mounts, tmp_path / "m") as mount:
            assert [(mount / f"f{i}").read_bytes() for i in range(2)] == [bytes([i]) * 5000 for i in range(2)]


async def test_nothing_is_found_while_images_come_and_go(
    leaf: ImagesLeaf, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "PAUSES_S", PAUSES_S)

    async def come_and_go() -> None:
        for i in range(15):
            await leaf.load(archive)
            await leaf.prepare(f"c{i}", image="x:1")
            await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=f"c{i}"))
            await leaf.images.Remove(pb.RemoveImageRequest(name="x:1"))

    working = asyncio.ensure_future(come_and_go())
    while not working.done():
        assert await check(leaf, repair=True) == []
        await asyncio.sleep(0)
    await working


async def test_leftovers_are_found_by_name_and_removed(leaf: ImagesLeaf, archive: Path) -> None:
    await leaf.load(archive)
    before = leaf.disk()
    (leaf.root / "blobs/sha256" / HEX).write_bytes(b"stray")
    (leaf.root / "blobs/sha256/readme").write_bytes(b"?")
    (leaf.root / "ingest/abc").mkdir()
    (leaf.root / "partial" / f"{HEX}.data").write_bytes(b"half")
    blob = next(name for name in before if name.startswith("blobs/")).rpartition("/")[2]
    (leaf.root / "partial" / f"{blob}.data").write_bytes(b"half")
    (leaf.root / "partial" / f"{blob}.log").write_bytes(b"4\n")
    (leaf.root / "overlay/l/900").mkdir()
    expected = [
        f"blob sha256:{HEX} has no row in the database",
        f"file {leaf.root}/blobs/sha256/readme is nothing of ours",
        f"file {leaf.root}/ingest/abc is nothing of ours",
        f"partial download {HEX} has lost one of its files",
        f"partial download {blob} has come to its end: its blob is here",
        "tree 900 of overlayfs belongs to no snapshot",
    ]
    assert sorted(await found(leaf)) == sorted(expected)
    assert sorted(await repaired(leaf)) == sorted(expected)
    assert leaf.disk() == before


async def test_a_download_that_can_be_resumed_is_no_leftover(leaf: ImagesLeaf) -> None:
    (leaf.root / "partial" / f"{HEX}.data").write_bytes(b"half")
    (leaf.root / "partial" / f"{HEX}.log").write_bytes(b"9\n0 4\n")
    assert await check(leaf, repair=True) == []


async def test_a_layer_that_lost_its_tree_is_unpacked_again(leaf: ImagesLeaf, archive: Path, tmp_path: Path) -> None:
    [image] = await leaf.load(archive)
    made = await leaf.prepare("c", image="x:1")
    for path in (leaf.root / "overlay/l").iterdir():
        shutil.rmtree(path)
    layers = [f"layer {one.chain_id} has lost its tree" for one in image.layers]
    assert await repaired(leaf) == layers
    with mounted(made.mounts, tmp_path / "m") as root:
        assert [(root / f"f{i}").read_bytes() for i in range(2)] == [bytes([i]) * 5000 for i in range(2)]


async def test_a_layer_without_its_blob_stays_a_finding(leaf: ImagesLeaf, archive: Path) -> None:
    [image] = await leaf.load(archive)
    await leaf.prepare("c", image="x:1")
    await leaf.images.Remove(pb.RemoveImageRequest(name="x:1", force=True))
    for path in (leaf.root / "overlay/l").iterdir():
        shutil.rmtree(path)
    [below, above] = await check(leaf, repair=True)
    assert below.subject == f"layer {image.layers[0].chain_id}"
    assert not below.repaired
    assert not above.repaired
    assert above.remedy == "remove the containers on it, and pull or import their image again"


async def test_a_writable_tree_that_is_gone_is_made_again(leaf: ImagesLeaf, archive: Path, tmp_path: Path) -> None:
    await leaf.load(archive)
    made = await leaf.prepare("c", image="x:1")
    shutil.rmtree(next((leaf.root / "overlay/s").iterdir()))
    [finding] = await check(leaf)
    assert finding.subject == "snapshot default/c"
    assert "what was written to it is lost" in finding.remedy
    assert await repaired(leaf) == ["snapshot default/c has lost its tree"]
    with mounted(made.mounts, tmp_path / "m") as root:
        (root / "new").touch()


async def test_lost_and_changed_blobs_are_told_with_their_images(leaf: ImagesLeaf, archive: Path) -> None:
    [image] = await leaf.load(archive)
    lost = leaf.root / "blobs/sha256" / image.layers[0].blob.digest[7:]
    lost.unlink()
    [finding] = await check(leaf)
    assert finding.problem == "is gone"
    assert "docker.io/library/x:1" in finding.remedy
    await repaired(leaf)
    assert await leaf.names() == ["x:1"]
    await leaf.load(archive)
    assert lost.exists()
    config = leaf.root / "blobs/sha256" / image.id[7:]
    config.write_bytes(config.read_bytes().replace(b"linux", b"lunix"))
    assert await repaired(leaf) == [f"blob {image.id} was changed on disk"]
    assert await leaf.names() == []


async def test_a_deep_check_reads_layers_too(leaf: ImagesLeaf, archive: Path) -> None:
    [image] = await leaf.load(archive)
    digest = image.layers[0].blob.digest
    blob = leaf.root / "blobs/sha256" / digest[7:]
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert await check(leaf) == []
    [finding] = (await leaf.images.Check(types_pb2.CheckRequest(deep=True))).findings
    assert (finding.subject, finding.problem) == (f"blob {digest}", "was changed on disk")
    assert "docker.io/library/x:1" in finding.remedy
    [finding] = (await leaf.images.Check(types_pb2.CheckRequest(deep=True, repair=True))).findings
    assert finding.repaired
    assert not blob.exists()
    await leaf.load(archive)
    assert blob.read_bytes() == data
    assert not (await leaf.images.Check(types_pb2.CheckRequest(deep=True))).findings


# A lost database


def lose(root: Path, how: str) -> None:
    if how == "moved away":
        for path in root.glob("images.db*"):
            path.rename(path.with_name(f"old-{path.name}"))
    elif how == "only the main file":
        (root / "images.db").unlink()
    elif how == "cut off":
        os.truncate(root / "images.db", 5000)
    else:
        (root / "images.db").write_bytes(b"garbage" * 10_000)


@pytest.mark.parametrize("how", ["moved away", "only the main file", "cut off", "overwritten"])
async def test_a_lost_database_is_made_anew_from_disk(tmp_path: Path, archive: Path, how: str) -> None:
    root = tmp_path / "images"
    async with images_leaf(root) as leaf:
        [image] = await leaf.load(archive)
        await leaf.images.Tag(pb.TagImageRequest(source="x:1", target="registry.example/y:2"))
        made = await leaf.prepare("c", image="x:1")
        with mounted(made.mounts, tmp_path / "m") as mount:
            (mount / "mine").write_text("kept")
        await leaf.prepare("step", image="x:1")
        await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="step", name="stage"))
        await leaf.view("v", parent="stage")
    before = {path for path in root.rglob("*") if path.is_file() and "images.db" not in path.name}
    lose(root, how)
    for _ in range(2):  # nothing is lost by a start without a repair
        async with images_leaf(root) as leaf:
            assert await leaf.names() == []
            [finding] = await check(leaf)
            assert finding.subject == f"database {root}/images.db"
    assert {path for path in before if not path.exists()} == set()
    async with images_leaf(root) as leaf:
        assert len(await repaired(leaf)) == 1
        assert await leaf.names() == ["x:1", "registry.example/y:2"]
        again = await leaf.images.Get(pb.GetImageRequest(name="x:1"))
        assert (again.id, again.target.digest, again.chain_id) == (image.id, image.target.digest, image.chain_id)
        mounts = (await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c"))).mounts
        assert list(mounts) == list(made.mounts)
        with mounted(mounts, tmp_path / "m") as mount:
            assert (mount / "mine").read_text() == "kept"
        listed = (await leaf.snapshots.List(pb.ListSnapshotsRequest())).snapshots
        assert {one.key for one in listed} >= {"c", "stage", "v"}
        await leaf.images.Prune(pb.PruneRequest(all=True))
        assert await leaf.names() == ["x:1", "registry.example/y:2"]
    async with images_leaf(root) as leaf:
        assert await check(leaf) == []


async def test_what_came_after_the_loss_stays_when_the_database_is_made_anew(tmp_path: Path, archive: Path) -> None:
    root = tmp_path / "images"
    async with images_leaf(root) as leaf:
        await leaf.load(archive)
        made = await leaf.prepare("old", image="x:1")
        with mounted(made.mounts, tmp_path / "m") as mount:
            (mount / "mine").write_text("kept")
    lose(root, "moved away")
    async with images_leaf(root) as leaf:
        await leaf.load(archive)
        await leaf.prepare("new", image="x:1")
        await repaired(leaf)
        assert await leaf.names() == ["x:1"]
        for key in ("old", "new"):
            mounts = (await leaf.snapshots.Mounts(pb.SnapshotRequest(key=key))).mounts
            with mounted(mounts, tmp_path / "m") as mount:
                assert (mount / "mine").exists() == (key == "old")
                assert (mount / "f1").exists()


async def test_without_marks_images_come_back_without_names(tmp_path: Path, archive: Path) -> None:
    root = tmp_path / "images"
    async with images_leaf(root) as leaf:
        [image] = await leaf.load(archive)
        await leaf.prepare("c", image="x:1")
    lose(root, "moved away")
    shutil.rmtree(root / "marks")
    (root / "names.json").write_text("{ not JSON")
    async with images_leaf(root) as leaf:
        await repaired(leaf)
        listed = (await leaf.images.List(pb.ListImagesRequest())).images
        assert [(one.name, one.id) for one in listed] == [("", image.id)]
        with pytest.raises(NotFound):
            await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c"))
        await leaf.prepare("d", image=image.id)
        await leaf.settled()
        assert await check(leaf) == []


async def test_no_namespace_gets_what_another_one_had(tmp_path: Path, archive: Path) -> None:
    root = tmp_path / "images"
    async with images_leaf(root) as leaf:
        with in_namespace("other"):
            await leaf.load(archive)
            await leaf.images.Tag(pb.TagImageRequest(source="x:1", target="y:1"))
            await leaf.images.Remove(pb.RemoveImageRequest(name="x:1"))
    lose(root, "moved away")
    async with images_leaf(root) as leaf:
        await repaired(leaf)
        assert await leaf.names() == []
        assert [blob async for blob in leaf.content.List(pb.ListBlobsRequest())] == []
        with in_namespace("other"):
            assert await leaf.names() == ["y:1"]
            assert len([blob async for blob in leaf.content.List(pb.ListBlobsRequest())]) == 4


@pytest.fixture
def stray_mount(leaf: ImagesLeaf) -> Iterator[Path]:
    where = leaf.root / "overlay/tmp/77"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", where], check=False, stderr=subprocess.DEVNULL)


async def test_a_mount_among_our_files_is_told_and_undone(leaf: ImagesLeaf, stray_mount: Path) -> None:
    assert f"mount {stray_mount} is none that we need" in await found(leaf)
    await repaired(leaf)
    assert "overlay/tmp/77" not in leaf.disk()


async def test_a_damaged_blob_is_not_taken_back(tmp_path: Path, archive: Path) -> None:
    root = tmp_path / "images"
    async with images_leaf(root) as leaf:
        [image] = await leaf.load(archive)
    lose(root, "moved away")
    (root / "blobs/sha256" / image.layers[1].blob.digest[7:]).write_bytes(b"damaged")
    async with images_leaf(root) as leaf:
        await repaired(leaf)
        assert await leaf.names() == []
        await leaf.load(archive)
        assert await leaf.names() == ["x:1"]


async def test_a_database_that_goes_while_it_is_in_use_is_told(leaf: ImagesLeaf) -> None:
    (leaf.root / "images.db").rename(leaf.root / "elsewhere.db")
    [finding] = await check(leaf)
    assert finding.problem == "was removed while it was in use"
    assert "restart corrald" in finding.remedy
    assert not (leaf.root / "images.db").exists()
    (leaf.root / "elsewhere.db").rename(leaf.root / "images.db")


async def test_marks_follow_what_they_mark(leaf: ImagesLeaf, archive: Path) -> None:
    await leaf.load(archive)
    await leaf.prepare("c", image="x:1")
    for _ in range(200):
        marks = [json.loads(path.read_text())["key"] for path in (leaf.root / "marks").iterdir()]
        if len(marks) == 3 and json.loads((leaf.root / "names.json").read_text()):
            break
        await asyncio.sleep(0.02)
    assert "c" in marks
    assert [name["name"] for name in json.loads((leaf.root / "names.json").read_text())] == ["docker.io/library/x:1"]
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c"))
    for _ in range(200):
        if len(list((leaf.root / "marks").iterdir())) == 2:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the mark of a removed tree stays")
