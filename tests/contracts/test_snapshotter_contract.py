"""What every snapshot driver promises, asked of the driver itself and again of the service over gRPC."""

import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from support.file_systems import FileSystems
from support.images_leaf import images_leaf
from support.overlay import Described, mounted
from support.requirements import needs
from support.snapshotters import CASES, case_id, driver_at, place_for

from corral.api.images.v1 import images_pb2 as pb
from corral.api.images.v1.images_pb2_grpc import SnapshotsStub
from corral.images.snapshotter import Snapshotter, TreeId

pytestmark = needs("root")

type Change = Callable[[Path], None]


class Trees(Protocol):
    """The few things a user of snapshots does; `on` is the name of a committed one, or empty."""

    async def prepare(self, key: str, on: str = "") -> Sequence[Described]: ...
    async def view(self, key: str, on: str = "") -> Sequence[Described]: ...
    async def commit(self, key: str, name: str) -> None: ...
    async def remove(self, key: str) -> None: ...
    async def usage(self, key: str) -> tuple[int, int]: ...


class DriverTrees:
    """Straight on the driver, with names kept here."""

    def __init__(self, driver: Snapshotter) -> None:
        self.driver = driver
        self.ids: dict[str, TreeId] = {}
        self.chains: dict[str, tuple[TreeId, ...]] = {"": ()}
        self.below: dict[str, tuple[TreeId, ...]] = {}

    async def _make(self, key: str, on: str, *, writable: bool) -> Sequence[Described]:
        tree = self.ids[key] = TreeId(len(self.ids) + 1)
        chain = self.below[key] = self.chains[on]
        self.driver.prepare(tree, chain, writable=writable)
        return self.driver.mounts(tree, chain, writable=writable)

    async def prepare(self, key: str, on: str = "") -> Sequence[Described]:
        return await self._make(key, on, writable=True)

    async def view(self, key: str, on: str = "") -> Sequence[Described]:
        return await self._make(key, on, writable=False)

    async def commit(self, key: str, name: str) -> None:
        self.driver.adopt(self.ids[key])
        assert self.driver.is_layer(self.ids[key])
        self.chains[name] = (self.ids[key], *self.below[key])

    async def remove(self, key: str) -> None:
        self.driver.remove(self.ids[key])

    async def usage(self, key: str) -> tuple[int, int]:
        found = self.driver.usage(self.ids[key])
        return found.size_bytes, found.inodes


class ServiceTrees:
    """Over the wire."""

    def __init__(self, stub: SnapshotsStub) -> None:
        self.stub = stub

    async def prepare(self, key: str, on: str = "") -> Sequence[Described]:
        return (await self.stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent_snapshot=on))).mounts

    async def view(self, key: str, on: str = "") -> Sequence[Described]:
        return (await self.stub.View(pb.PrepareSnapshotRequest(key=key, parent_snapshot=on))).mounts

    async def commit(self, key: str, name: str) -> None:
        await self.stub.Commit(pb.CommitSnapshotRequest(key=key, name=name))

    async def remove(self, key: str) -> None:
        await self.stub.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=True))

    async def usage(self, key: str) -> tuple[int, int]:
        found = await self.stub.Usage(pb.SnapshotRequest(key=key))
        return found.size_bytes, found.inodes


@pytest.fixture(params=CASES, ids=case_id)
def place(request: pytest.FixtureRequest, tmp_path: Path, file_systems: FileSystems) -> tuple[str, Path]:
    """A driver's name, and a directory for it."""
    return request.param[0], place_for(request.param, tmp_path, file_systems)


@pytest.fixture(params=["driver", "grpc"])
async def trees(request: pytest.FixtureRequest, place: tuple[str, Path]) -> AsyncIterator[Trees]:
    name, root = place
    if request.param == "driver":
        driver = driver_at(name, root)
        driver.open()
        yield DriverTrees(driver)
        driver.close()
    else:
        async with images_leaf(root / "root", driver=name) as leaf:
            yield ServiceTrees(leaf.snapshots)


@pytest.fixture
def change(trees: Trees, tmp_path: Path) -> Callable[..., object]:
    """Make a committed snapshot by changing a tree on top of another."""

    async def make(name: str, by: Change, on: str = "") -> None:
        with mounted(await trees.prepare(f"make-{name}", on), tmp_path / "work") as root:
            by(root)
        await trees.commit(f"make-{name}", name)

    return make


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


async def test_a_tree_on_nothing_is_empty_and_writable(trees: Trees, tmp_path: Path) -> None:
    with mounted(await trees.prepare("a"), tmp_path / "m") as root:
        assert listing(root) == set()
        assert stat.S_IMODE(root.stat().st_mode) == 0o755
        (root / "f").write_text("x")
    await trees.remove("a")


async def test_a_tree_sees_its_layers_and_changes_none_of_them(trees: Trees, change, tmp_path: Path) -> None:
    await change("one", lambda root: (root / "f").write_text("one"))
    await change("two", lambda root: (root / "g").write_text("two"), "one")
    with mounted(await trees.prepare("a", "two"), tmp_path / "a") as root:
        assert listing(root) == {"f", "g"}
        (root / "f").write_text("changed")
        (root / "g").unlink()
        with mounted(await trees.prepare("b", "two"), tmp_path / "b") as other:
            assert (other / "f").read_text() == "one"
            assert (other / "g").read_text() == "two"
        assert listing(root) == {"f"}
    with mounted(await trees.view("v", "two"), tmp_path / "v") as view:
        assert (view / "f").read_text() == "one"
    for key in ("a", "b", "v"):
        await trees.remove(key)


async def test_what_was_removed_stays_removed_in_what_is_built_on_it(trees: Trees, change, tmp_path: Path) -> None:
    def fill(root: Path) -> None:
        (root / "d/e").mkdir(parents=True)
        (root / "d/old").write_text("1")
        (root / "f").write_text("1")
        (root / "kept").write_text("1")

    def remove_and_replace(root: Path) -> None:
        (root / "f").unlink()
        (root / "d/old").unlink()
        (root / "d/e").rmdir()
        (root / "d").rmdir()
        (root / "d").mkdir()
        (root / "d/new").write_text("2")

    await change("full", fill)
    await change("less", remove_and_replace, "full")
    await change("more", lambda root: (root / "d/newer").write_text("3"), "less")
    for how in (trees.view, trees.prepare):
        with mounted(await how(how.__name__, "more"), tmp_path / "m") as root:
            assert listing(root) == {"d", "d/new", "d/newer", "kept"}


async def test_owners_modes_times_links_and_attributes_survive_a_commit(
    place: tuple[str, Path], trees: Trees, change, tmp_path: Path
) -> None:
    def fill(root: Path) -> None:
        (root / "f").write_text("x")
        os.chown(root / "f", 1000, 50)
        (root / "f").chmod(0o4751)
        os.setxattr(root / "f", "user.note", b"hi")
        os.utime(root / "f", ns=(1, 1234567890123456789))
        (root / "g").hardlink_to(root / "f")
        (root / "s").symlink_to("/nowhere")
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mkfifo(root / "pipe")
        root.chmod(0o711)

    await change("full", fill)
    with mounted(await trees.prepare("a", "full"), tmp_path / "m") as root:
        status = (root / "f").stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 50, 0o4751)
        whole_seconds = place[0] == "aufs"  # is all that it takes
        assert status.st_mtime_ns == (1234567890000000000 if whole_seconds else 1234567890123456789)
        assert os.getxattr(root / "f", "user.note") == b"hi"
        assert status.st_nlink == 2
        assert str((root / "s").readlink()) == "/nowhere"
        assert (root / "null").stat().st_rdev == os.makedev(1, 3)
        assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
        assert stat.S_IMODE(root.stat().st_mode) == 0o711


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_a_view_cannot_be_written(trees: Trees, change, tmp_path: Path, depth: int) -> None:
    on = ""
    for i in range(depth):
        await change(f"l{i}", lambda root, i=i: (root / f"f{i}").write_text("x"), on)
        on = f"l{i}"
    with mounted(await trees.view("v", on), tmp_path / "m") as root:
        assert listing(root) == {f"f{i}" for i in range(depth)}
        with pytest.raises(OSError, match="Read-only"):
            (root / "new").write_text("x")
    await trees.remove("v")


async def test_more_than_a_hundred_layers(trees: Trees, change, tmp_path: Path, place: tuple[str, Path]) -> None:
    on, count = "", 120
    # The latter take a second for each, made like this; and what the driver does over the wire it does here too.
    if isinstance(trees, DriverTrees) or place[0] in ("blockfile", "devicemapper"):
        count = 10
    for i in range(count):
        await change(f"l{i}", lambda root, i=i: (root / f"f{i}").write_text(str(i)), on)
        on = f"l{i}"
    with mounted(await trees.prepare("top", on), tmp_path / "m") as root:
        assert (root / "f0").read_text() == "0"
        assert len(listing(root)) == count
        (root / "f0").write_text("changed")


async def test_usage_is_what_the_tree_itself_takes(trees: Trees, change, tmp_path: Path) -> None:
    await change("base", lambda root: (root / "big").write_bytes(bytes(1 << 20)))
    with mounted(await trees.prepare("a", "base"), tmp_path / "m") as root:
        assert (await trees.usage("a"))[0] < 100_000
        (root / "f").write_bytes(os.urandom(300_000))
        (root / "g").hardlink_to(root / "f")
        os.sync()
        size, inodes = await trees.usage("a")
    assert 300_000 <= size < 400_000
    assert inodes <= 2
    await trees.remove("a")


def mounts_below(directory: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]


async def test_nothing_is_mounted_on_the_host(trees: Trees, change, tmp_path: Path) -> None:
    before = mounts_below(tmp_path)  # a file system of the test's own, perhaps
    await change("base", lambda root: None)
    await trees.prepare("a", "base")
    assert mounts_below(tmp_path) == before
    await trees.remove("a")
    assert mounts_below(tmp_path) == before
