"""Trees that are made before anybody asks for one, and removed after nobody needs them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.images.tending import READY

pytestmark = needs("root", "overlayfs")


@pytest.fixture
async def leaf(tmp_path: Path) -> AsyncIterator[ImagesLeaf]:
    async with images_leaf(tmp_path / "images") as leaf:
        await leaf.settled()
        yield leaf


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_trees_wait_ready_and_each_is_used_once(leaf: ImagesLeaf) -> None:
    ready = names(leaf.root / "overlay/r")
    assert len(ready) == READY
    await asyncio.gather(*(leaf.prepare(f"t{number}") for number in range(3 * READY)))
    active = names(leaf.root / "overlay/s")
    assert len(active) == 3 * READY
    assert active > ready
    await leaf.settled()
    assert len(names(leaf.root / "overlay/r")) == READY
    assert not names(leaf.root / "overlay/r") & active


async def test_what_is_removed_is_gone_soon_whether_it_was_written_to_or_not(leaf: ImagesLeaf, tmp_path: Path) -> None:
    for key in ("never-mounted", "mounted", "written"):
        made = await leaf.prepare(key)
        if key != "never-mounted":
            with mounted(made.mounts, tmp_path / "m") as root:
                if key == "written":
                    (root / "d/e").mkdir(parents=True)
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=True))
    for _ in range(100):
        if not names(leaf.root / "overlay/s"):
            return
        await asyncio.sleep(0.02)
    assert not names(leaf.root / "overlay/s")


async def test_nothing_ready_outlives_the_service_or_its_sudden_end(tmp_path: Path) -> None:
    root = tmp_path / "images"
    async with images_leaf(root) as leaf:
        await leaf.settled()
    assert not names(root / "overlay/r")
    for directory in ("7/u", "7/w", "8"):  # as a killed one leaves them
        (root / "overlay/r" / directory).mkdir(parents=True)
    async with images_leaf(root) as leaf:
        await leaf.settled()
        assert not names(root / "overlay/r") & {"7", "8"}
        assert len(names(root / "overlay/r")) == READY


async def test_a_tree_can_be_made_although_none_could_be_made_ready(leaf: ImagesLeaf) -> None:
    leaf.service._tending._ready.clear()
    await leaf.prepare("a")
    assert len(names(leaf.root / "overlay/s")) == 1
