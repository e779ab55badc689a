"""What is promised of a driver's own directory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.file_systems import FileSystems
from support.images import Entry
from support.overlay import mounted
from support.requirements import needs
from support.snapshotters import CASES, case_id, driver_at, place_for, unpack_here, work_here

from corral.images.drivers.overlayfs import Overlayfs
from corral.images.snapshotter import Snapshotter, TreeId
from corral.kernel.btrfs import create_subvolume

pytestmark = needs("root")


@pytest.fixture(params=CASES, ids=case_id)
def driver(request: pytest.FixtureRequest, tmp_path: Path, file_systems: FileSystems) -> Iterator[Snapshotter]:
    made = driver_at(request.param[0], place_for(request.param, tmp_path, file_systems))
    made.open()
    made.open()  # again, as at every start
    yield made
    made.close()


def test_a_staged_tree_becomes_a_layer(driver: Snapshotter, tmp_path: Path) -> None:
    unpack_here(driver, TreeId(7), Entry("f", b"x"))
    assert not driver.is_layer(TreeId(7))
    driver.commit([TreeId(7)])
    assert driver.is_layer(TreeId(7))
    with mounted(driver.mounts(TreeId(8), (TreeId(7),), writable=False), tmp_path / "m") as root:
        assert (root / "f").read_text() == "x"


def test_everything_on_disk_is_told_and_can_be_removed(driver: Snapshotter) -> None:
    driver.stage(TreeId(1))
    unpack_here(driver, TreeId(2))
    driver.commit([TreeId(2)])
    driver.prepare(TreeId(3), (TreeId(2),), writable=True)
    driver.prepare(TreeId(4), (), writable=True)
    assert set(driver.trees()) == {1, 2, 3, 4}
    for tree in (1, 2, 3, 4, 5):
        driver.remove(TreeId(tree))
        driver.remove(TreeId(tree))
    assert set(driver.trees()) == set()


def test_a_view_on_layers_takes_nothing(driver: Snapshotter) -> None:
    unpack_here(driver, TreeId(1))
    driver.commit([TreeId(1)])
    driver.prepare(TreeId(2), (TreeId(1),), writable=False)
    assert set(driver.trees()) == {1}


def test_overlayfs_refuses_a_root_that_its_options_cannot_hold(tmp_path: Path) -> None:
    assert "':'" in Overlayfs(tmp_path / "a:b", work_here).check()
    assert Overlayfs(tmp_path / "not/yet/there", work_here).check() == ""


def test_the_path_of_a_layer_is_short(tmp_path: Path) -> None:
    overlay = Overlayfs(Path("/var/lib/corral/images/overlay"), work_here)
    [mount] = overlay.mounts(TreeId(1), (TreeId(123_456),), writable=False)
    assert len(mount.source) < 45


def test_subvolumes_that_a_container_made_go_with_its_tree(tmp_path: Path, file_systems: FileSystems) -> None:
    made = driver_at("btrfs", place_for(("btrfs", "btrfs"), tmp_path, file_systems))
    made.open()
    made.prepare(TreeId(1), (), writable=True)
    root = Path(made.mounts(TreeId(1), (), writable=True)[0].source)
    for above in (root, root / "own"):
        fd = os.open(above, os.O_RDONLY)
        create_subvolume(fd, "own")
        os.close(fd)
        (above / "own/f").write_text("x")
    made.remove(TreeId(1))
    assert set(made.trees()) == set()
