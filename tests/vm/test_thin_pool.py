"""What is promised of thin pools, and of the snapshot driver on them, beyond what every driver promises.

Run by `make test-vm`: few other kernels that tests meet have a device mapper.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.file_systems import loop_devices
from support.images import Entry
from support.overlay import mounted
from support.requirements import needs
from support.snapshotters import unpack_here, work_here

from corral.images.drivers.devicemapper import Devicemapper
from corral.images.drivers.thin_pool import ThinPool
from corral.images.snapshotter import TreeId
from corral.kernel import device_mapper

pytestmark = needs("root", "device mapper")

ONE, TWO, THREE = map(TreeId, (1, 2, 3))
QUOTA = 16 << 20


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Devicemapper]:
    made = Devicemapper(tmp_path / "d", work_here)
    made.open()
    yield made
    made.close()


def another(driver: Devicemapper, tmp_path: Path) -> Devicemapper:
    """As the next daemon has it."""
    driver.close()
    made = Devicemapper(tmp_path / "d", work_here)
    made.open()
    return made


def pool_of(root: Path) -> str:
    return ThinPool(root)._pool


def stored(root: Path) -> int:
    os.sync()
    return (root / "data").stat().st_blocks * 512


def test_what_is_closed_leaves_nothing_in_the_kernel_and_is_there_again(driver: Devicemapper, tmp_path: Path) -> None:
    unpack_here(driver, ONE, Entry("f", b"x"))
    driver.commit([ONE])
    driver.prepare(TWO, (ONE,), writable=True)
    with mounted(driver.mounts(TWO, (ONE,), writable=True), tmp_path / "m") as root:
        (root / "mine").write_text("y")
        driver.close()  # somebody uses it: it stays
        (root / "more").write_text("z")
    driver.close()
    assert device_mapper.find(pool_of(tmp_path / "d")) is None
    assert loop_devices(tmp_path) == []
    again = another(driver, tmp_path)
    try:
        with mounted(again.mounts(TWO, (ONE,), writable=True), tmp_path / "m") as root:
            assert {path.name for path in root.iterdir()} == {"f", "mine", "more"}
    finally:
        again.close()


def test_a_device_keeps_its_path_whatever_its_number(driver: Devicemapper, tmp_path: Path) -> None:
    driver.prepare(ONE, (), writable=True)
    driver.prepare(TWO, (), writable=True)
    first = [driver.mounts(tree, (), writable=True)[0].parts[0] for tree in (ONE, TWO)]
    numbers = [Path(part.source).stat().st_rdev for part in first]
    again = another(driver, tmp_path)
    try:
        second = [again.mounts(tree, (), writable=True)[0].parts[0] for tree in (TWO, ONE)][::-1]
        assert second == first
        assert [Path(part.source).stat().st_rdev for part in second] == numbers[::-1]
    finally:
        again.close()


def test_what_was_removed_gives_its_room_back(driver: Devicemapper, tmp_path: Path) -> None:
    driver.prepare(ONE, (), writable=True)
    empty = stored(tmp_path / "d")
    for tree in (TWO, THREE):
        driver.prepare(tree, (), writable=True)
        with mounted(driver.mounts(tree, (), writable=True), tmp_path / "m") as root:
            (root / "f").write_bytes(os.urandom(20 << 20))
        assert stored(tmp_path / "d") > empty + (20 << 20)
        driver.remove(tree)
        assert stored(tmp_path / "d") < empty + (2 << 20)


def test_a_number_that_was_written_down_and_never_used_is_no_loss(driver: Devicemapper, tmp_path: Path) -> None:
    driver.prepare(ONE, (), writable=True)
    died = tmp_path / "d/s/2"
    died.mkdir()
    (died / "thin").write_text("7")
    again = another(driver, tmp_path)
    try:
        assert set(again.trees()) == {ONE, TWO}
        again.remove(TWO)
        assert set(again.trees()) == {ONE}
    finally:
        again.close()


def test_a_device_that_nobody_knows_of_is_no_obstacle(tmp_path: Path, driver: Devicemapper) -> None:
    """As after a power loss that took a directory with it."""
    driver.prepare(ONE, (), writable=True)
    number = int((tmp_path / "d/s/1/thin").read_text())
    device_mapper.message(pool_of(tmp_path / "d"), f"create_thin {number + 1}")
    driver.prepare(TWO, (), writable=True)
    assert int((tmp_path / "d/s/2/thin").read_text()) == number + 1
    with mounted(driver.mounts(TWO, (), writable=True), tmp_path / "m") as root:
        assert list(root.iterdir()) == []


def small_pool(tmp_path: Path) -> Devicemapper:
    """On files that were put there, as devices would be."""
    for name, size in (("data", 96 << 20), ("metadata", 4 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    made = Devicemapper(tmp_path / "d", work_here, data=tmp_path / "data", metadata=tmp_path / "metadata")
    made.open()
    return made


def fill(path: Path, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(size >> 20):
            os.write(fd, os.urandom(1 << 20))
            os.fsync(fd)
    finally:
        os.close(fd)


def test_who_fills_the_pool_is_told_at_once_and_whoever_comes_next_by_a_sentence(tmp_path: Path) -> None:
    driver = small_pool(tmp_path)
    try:
        driver.prepare(ONE, (), writable=True)
        with (
            mounted(driver.mounts(ONE, (), writable=True), tmp_path / "m") as root,
            pytest.raises(OSError, match=r"No space|Input/output"),
        ):
            fill(root / "f", 200 << 20)
        with pytest.raises(OSError, match=r"thin pool's data on .*/data are full to \d+ %.*enlarge that") as full:
            driver.prepare(TWO, (), writable=True)
        assert full.value.errno == errno.ENOSPC
        driver.remove(ONE)
        driver.prepare(TWO, (), writable=True)
    finally:
        driver.close()


def test_a_pool_that_is_another_one_is_not_touched(tmp_path: Path) -> None:
    driver = small_pool(tmp_path)
    driver.prepare(ONE, (), writable=True)
    driver.close()
    (tmp_path / "d/pool").write_text("12345")
    other = Devicemapper(tmp_path / "d", work_here, data=tmp_path / "data", metadata=tmp_path / "metadata")
    other.open()
    with pytest.raises(OSError, match="is not the one that was used with"):
        other.prepare(TWO, (), writable=True)
    other.close()
    with (tmp_path / "metadata").open("r+b") as file:  # a new one, though trees are recorded
        file.write(bytes(4096))
    with pytest.raises(OSError, match="is not the one that was used with"):
        other.prepare(TWO, (), writable=True)
    other.close()


def test_a_layer_is_clean_whatever_its_journal_has_still_to_do(driver: Devicemapper, tmp_path: Path) -> None:
    """A copy of a tree in use is as it would be after the machine was lost."""
    driver.prepare(ONE, (), writable=True)
    with mounted(driver.mounts(ONE, (), writable=True), tmp_path / "m") as root:
        (root / "f").write_text("x")
        os.sync()
        (tmp_path / "d/s/2").mkdir()
        (tmp_path / "d/s/2/thin").write_text("70")
        device_mapper.message(pool_of(tmp_path / "d"), f"create_snap 70 {(tmp_path / 'd/s/1/thin').read_text()}")
    driver.adopt(TWO)
    with mounted(driver.mounts(THREE, (TWO,), writable=False), tmp_path / "m") as root:
        assert (root / "f").read_text() == "x"


def test_a_quota_is_what_is_free_whatever_lies_below(driver: Devicemapper, tmp_path: Path) -> None:
    driver.prepare(ONE, (), writable=True, quota_bytes=QUOTA)
    with mounted(driver.mounts(ONE, (), writable=True), tmp_path / "m") as root:
        (root / "f").write_bytes(bytes(QUOTA // 2))
    driver.adopt(ONE)
    for tree, quota in ((TWO, QUOTA), (THREE, 20 << 30)):
        before = stored(tmp_path / "d")
        driver.prepare(tree, (ONE,), writable=True, quota_bytes=quota)
        assert stored(tmp_path / "d") < before + (64 << 20)  # and not what inode tables take, 256 MiB of the larger one
        with mounted(driver.mounts(tree, (ONE,), writable=True), tmp_path / "m") as root:
            room = os.statvfs(root)
            assert quota - (1 << 20) < room.f_bavail * room.f_frsize <= quota
            assert [path.name for path in root.iterdir()] == ["f"]
