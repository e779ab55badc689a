"""What a container has changed is told, and becomes a layer, whichever driver its tree is made by."""

import io
import os
import shutil
import stat
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.file_systems import FileSystems
from support.images import Entry, directory, image_config, layer, symlink, write_docker_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.requirements import needs
from support.snapshotters import CASES, case_id, place_for

from corral.api.images.v1 import images_pb2 as pb

pytestmark = needs("root", "overlayfs")

LETTERS = {1: "A", 2: "C", 3: "D"}
OLD = {"mtime": "1000000000"}
LAYERS = [
    layer(
        [
            directory("etc"),
            Entry("etc/passwd", b"root", pax=OLD),
            Entry("etc/same", b"same", pax=OLD),
            directory("gone"),
            Entry("gone/f", b"1"),
            directory("left"),
            Entry("left/f", b"left", pax=OLD),
            directory("right"),
            Entry("right/f", b"best", pax=OLD),
            symlink("s", "etc"),
        ]
    ),
    layer([Entry("etc/hidden", b"x"), Entry(".wh.s"), Entry("bin", b"#!", 0o755), directory("kept"), Entry("kept/f")]),
    layer([Entry("etc/.wh.hidden"), directory("kept"), Entry("kept/.wh..wh..opq"), Entry("kept/g", b"g")]),
]


@asynccontextmanager
async def started(case: tuple[str, str], directory: Path, systems: FileSystems) -> AsyncIterator[ImagesLeaf]:
    place = place_for(case, directory, systems)
    async with images_leaf(place / "images", driver=case[0]) as leaf:
        archive = write_docker_archive(directory / "base.tar", "base:1", LAYERS, image_config(LAYERS))
        await leaf.load(archive)
        yield leaf


def write(root: Path) -> None:
    """What a container might do, and some of what it might do to deceive."""
    (root / "etc/passwd").write_bytes(b"toor")
    os.utime(root / "etc/passwd", ns=(10**18, 10**18))  # as long and as old as before
    (root / "etc/same").write_bytes(b"same")
    os.utime(root / "etc/same", ns=(10**18, 10**18))
    shutil.move(root / "left", root / "between")
    shutil.move(root / "right", root / "left")  # whose file is as long and as old as the one that was there
    shutil.move(root / "between", root / "right")
    (root / "gone/f").unlink()
    (root / "gone").rmdir()
    (root / "new").mkdir()
    (root / "new/one").write_bytes(b"linked")
    os.link(root / "new/one", root / "new/two")
    (root / "bin").unlink()
    (root / "bin").mkdir()
    (root / "bin/sh").symlink_to("one")
    (root / "kept/g").chmod(0o600)
    os.mkfifo(root / "kept/fifo")


def look(root: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        target = str(path.readlink()) if path.is_symlink() else ""
        found[str(path.relative_to(root))] = (stat.filemode(status.st_mode), status.st_nlink, content, target)
    return {path: facts if not facts[0].startswith("d") else facts[:1] for path, facts in found.items()}  # type: ignore[index]


async def told(leaf: ImagesLeaf, key: str) -> list[str]:
    parts = [part async for part in leaf.snapshots.Changes(pb.SnapshotRequest(key=key))]
    return [f"{LETTERS[change.kind]} {change.path.removeprefix('/')}" for part in parts for change in part.changes]


@pytest.mark.parametrize("case", CASES, ids=case_id)
async def test_what_was_changed_is_told_and_becomes_a_layer(
    case: tuple[str, str], tmp_path: Path, file_systems: FileSystems
) -> None:
    async with started(case, tmp_path, file_systems) as leaf:
        made = await leaf.prepare("c", image="base:1")
        assert await told(leaf, "c") == []
        with mounted(made.mounts, tmp_path / "m") as root:
            write(root)
            wanted = look(root)
            while_mounted = await told(leaf, "c")
            image = await leaf.images.Commit(pb.CommitImageRequest(key="c", name="made:1"))
        changes = await told(leaf, "c")
        assert changes == while_mounted
        assert {"C etc", "C etc/passwd", "A new", "A new/one", "A new/two", "C bin", "A bin/sh", "D gone"} <= set(
            changes
        )
        assert {"C kept/g", "A kept/fifo", "C kept", "C left/f", "C right/f"} <= {
            change.replace("A left/f", "C left/f").replace("A right/f", "C right/f") for change in changes
        }
        assert not {change for change in changes if change.endswith(("hidden", " s"))}
        again = await leaf.images.Commit(pb.CommitImageRequest(key="c", name="made:2"))
        assert again.layers[-1].diff_id == image.layers[-1].diff_id, "the same changes give the same bytes"
        other = await leaf.view("again", image="made:1")
        with mounted(other.mounts, tmp_path / "m") as root:
            assert look(root) == wanted


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ("native", "btrfs")], ids=case_id)
async def test_a_tree_that_is_whole_tells_no_more_than_was_changed(
    case: tuple[str, str], tmp_path: Path, file_systems: FileSystems
) -> None:
    """What was written as it had been is no change, though its ctime is another."""
    async with started(case, tmp_path, file_systems) as leaf:
        made = await leaf.prepare("c", image="base:1")
        with mounted(made.mounts, tmp_path / "m") as root:
            write(root)
        changes = await told(leaf, "c")
        assert "C etc/same" not in changes
        assert sorted(changes) == sorted(set(changes))
        inside = [change for change in changes if "/" in change]
        for change in inside:
            above = change[2:].rpartition("/")[0]
            assert {f"A {above}", f"C {above}"} & set(changes), f"{change} is told, and not what it is in"


@needs("ext4")
async def test_changes_in_a_file_of_their_own_are_told_while_they_are_mounted_and_after(tmp_path: Path) -> None:
    """Also of another driver, if the tree is bounded by such a file."""
    async with images_leaf(tmp_path / "images") as leaf:
        await leaf.load(write_docker_archive(tmp_path / "base.tar", "base:1", LAYERS, image_config(LAYERS)))
        request = pb.PrepareSnapshotRequest(key="c", image="base:1", quota_bytes=16 << 20)
        made = await leaf.snapshots.Prepare(request)
        with mounted(made.mounts, tmp_path / "m") as root:
            (root / "f").write_bytes(b"f")
            assert await told(leaf, "c") == ["A f"]
        assert await told(leaf, "c") == ["A f"]
        image = await leaf.images.Commit(pb.CommitImageRequest(key="c", name="made:1"))
        assert len(image.layers) == len(LAYERS) + 1
        exported = leaf.snapshots.Export(pb.SnapshotRequest(key="c"))
        with tarfile.open(fileobj=io.BytesIO(b"".join([part.data async for part in exported]))) as tar:
            assert {"f", "etc/passwd", "kept/g"} < set(tar.getnames())
