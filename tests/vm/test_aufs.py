"""What is promised of aufs, and of the snapshot driver on it, beyond what every driver promises.

Run with a kernel that has aufs: `tests/vm/run.py --kernel IMAGE`.
"""

import io
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.images import Entry, directory, image_config, layer, symlink, write_docker_archive
from support.images_leaf import images_leaf
from support.overlay import mounted
from support.requirements import needs
from support.snapshotters import driver_at, work_here

from corral.api.images.v1 import images_pb2 as pb
from corral.images.drivers.aufs import Aufs
from corral.images.layers.hiding import Marks
from corral.images.layers.packing import packed
from corral.images.snapshotter import Missing, Snapshotter, TreeId

pytestmark = needs("root", "overlayfs", "aufs")

CAPABILITY = "security.capability"
NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")


def add(driver: Snapshotter, tree: int, below: tuple[TreeId, ...], *entries: Entry) -> tuple[TreeId, ...]:
    """A layer of these entries; returns the chain that it is the uppermost of."""
    made = TreeId(tree)
    target = driver.stage(made)
    blob = target.parent / "blob"
    blob.write_bytes(layer(entries))
    job = {"op": "apply", "blob": str(blob), "target": str(target), "bottom": not below, "diff_id": ""}
    applied = work_here(job)
    driver.build(made, below, Missing(applied["implicit"], [(a, b) for a, b in applied["links"]]))
    driver.commit([made])
    return (made, *below)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Aufs]:
    made = Aufs(tmp_path / "aufs", work_here)
    assert made.check() == ""
    made.open()
    yield made
    made.close()


def filled(driver: Snapshotter) -> tuple[TreeId, ...]:
    names = ["f", "g", "replaced", "d/f", "d/g", "d/e/f", "gone/f", "gone/e/f", "swap/f", "moved", "both/f"]
    parents = [directory(name) for name in ("d", "d/e", "gone", "gone/e", "swap", "both")]
    one = Entry("one", b"one")
    links = [Entry(f"link{i}", kind=tarfile.LNKTYPE, link="one") for i in range(2)]
    bottom = add(driver, 1, (), *parents, *(Entry(name, name.encode()) for name in names), one, *links)
    return add(driver, 2, bottom, Entry(".wh.g"), directory("both"), Entry("both/.wh.f"), symlink("s", "f"))


def write(root: Path) -> None:
    """What a container might do."""
    (root / "f").write_text("changed")
    (root / "g").write_text("again, where a layer hid one")
    (root / "d/f").chmod(0o600)
    os.setxattr(root / "d/g", "user.note", b"n")
    (root / "d/e/f").unlink()
    shutil.rmtree(root / "gone")
    shutil.rmtree(root / "swap")
    (root / "swap").mkdir()
    (root / "swap/new").write_text("n")
    (root / "replaced").unlink()
    (root / "replaced").mkdir()
    (root / "moved").rename(root / "d/moved")
    (root / "new/inner/most").mkdir(parents=True)
    (root / "new/inner/most/f").write_text("f")
    (root / "new/inner").rename(root / "d/inner")
    (root / "link0").write_text("one of three")
    (root / "made").write_text("m")
    (root / "other").hardlink_to(root / "made")
    (root / "s").unlink()
    (root / "s").symlink_to("elsewhere")
    os.mkfifo(root / "pipe")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (root / "both/back").write_text("b")
    (root / "passing").write_text("p")
    (root / "passing").unlink()


def members(driver: Snapshotter, tree: TreeId, chain: tuple[TreeId, ...]) -> list[tuple[object, ...]]:
    apart = driver.apart(tree, chain)
    fd = os.open(apart.source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        data = b"".join(packed(fd, Marks(apart.marks or "overlay")))
    finally:
        os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [
            (one.name, one.type, oct(one.mode), one.size, one.linkname, one.pax_headers.get("SCHILY.xattr.user.note"))
            for one in archive
        ]


def test_a_tree_gives_the_tar_that_it_gives_on_overlayfs(driver: Aufs, tmp_path: Path) -> None:
    other = driver_at("overlayfs", tmp_path)
    other.open()
    found = []
    for each in (driver, other):
        chain = filled(each)
        each.prepare(TreeId(3), chain, writable=True)
        with mounted(each.mounts(TreeId(3), chain, writable=True), tmp_path / "m") as root:
            write(root)
        found.append(members(each, TreeId(3), chain))
    # There a directory that was moved hides what there never was.
    moved = [member for member in found[1] if member[0] == "d/inner/.wh..wh..opq"]
    assert len(moved) == 1
    assert found[0] == [member for member in found[1] if member not in moved]


def shown(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def test_what_was_written_is_the_same_when_it_is_mounted_again_and_as_a_layer(driver: Aufs, tmp_path: Path) -> None:
    chain = filled(driver)
    driver.prepare(TreeId(3), chain, writable=True)
    with mounted(driver.mounts(TreeId(3), chain, writable=True), tmp_path / "m") as root:
        write(root)
        wanted = {**shown(root), "link1": "one", "one": "one"}
        assert shown(root) == wanted
        assert (root / "link0").stat().st_nlink == 1
    with mounted(driver.mounts(TreeId(3), chain, writable=True), tmp_path / "m") as root:
        assert shown(root) == wanted
    driver.adopt(TreeId(3))
    assert not [path for path in (tmp_path / "aufs/l/3").iterdir() if path.name.startswith(".wh..wh.")]
    for writable in (False, True):
        above, on = TreeId(4), (TreeId(3), *chain)
        driver.prepare(above, on, writable=writable)
        with mounted(driver.mounts(above, on, writable=writable), tmp_path / "m") as root:
            assert shown(root) == wanted


def test_hundreds_of_branches_take_more_than_one_call(driver: Aufs, tmp_path: Path) -> None:
    count = min(driver.max_layers, 400)
    assert count > 125
    chain: tuple[TreeId, ...] = ()
    for number in range(1, count + 1):
        driver.stage(TreeId(number))
        (tmp_path / f"aufs/tmp/{number}/f{number}").write_text(f"{number}")
        (tmp_path / f"aufs/tmp/{number}/common").write_text(f"{number}")
        driver.commit([TreeId(number)])
        chain = (TreeId(number), *chain)
    top = TreeId(count + 1)
    driver.prepare(top, chain, writable=True)
    with mounted(driver.mounts(top, chain, writable=True), tmp_path / "m") as root:
        assert len(list(root.iterdir())) == count + 1
        assert (root / "common").read_text() == f"{count}"
        (root / "f1").unlink()
        (root / "f2").write_text("mine")
    with mounted(driver.mounts(top, chain, writable=True), tmp_path / "m") as root:
        assert not (root / "f1").exists()
        assert (root / "f2").read_text() == "mine"


def test_inodes_keep_their_numbers_and_the_table_is_nowhere_to_be_seen(driver: Aufs, tmp_path: Path) -> None:
    chain = filled(driver)
    driver.prepare(TreeId(3), chain, writable=True)
    with mounted(driver.mounts(TreeId(3), chain, writable=True), tmp_path / "m") as root:
        before = {path: path.lstat().st_ino for path in root.rglob("*")}
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert {path: path.lstat().st_ino for path in root.rglob("*")} == before
        (root / "f").write_text("copied up")
        assert (root / "f").stat().st_ino == before[root / "f"]
    assert {path.name for path in (tmp_path / "aufs/s/3/u").iterdir()} == {".wh..wh.aufs", ".wh..wh.orph", "f"}
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    assert not [line for line in lines if "aufs" in line.partition(" - ")[2]]


def test_capabilities_of_a_file_are_copied_up_with_it(driver: Aufs, tmp_path: Path) -> None:
    pax = {f"SCHILY.xattr.{CAPABILITY}": NET_RAW.decode("latin-1")}
    chain = add(driver, 1, (), Entry("ping", b"x", 0o755, pax=pax), Entry("f", b"x"))
    chain = add(driver, 2, chain, Entry("g", b"x"))
    driver.prepare(TreeId(3), chain, writable=True)
    with mounted(driver.mounts(TreeId(3), chain, writable=True), tmp_path / "m") as root:
        value = os.getxattr(root / "ping", CAPABILITY)
        (root / "ping").rename(root / "pong")
        assert os.getxattr(root / "pong", CAPABILITY) == value


@pytest.mark.parametrize("on_layers", [True, False])
def test_nobody_inside_can_make_what_hides(driver: Aufs, tmp_path: Path, on_layers: bool) -> None:
    chain = filled(driver) if on_layers else ()
    driver.prepare(TreeId(3), chain, writable=True)
    attempts: tuple[Callable[[Path], object], ...] = (Path.touch, Path.mkdir, os.mkfifo)
    with mounted(driver.mounts(TreeId(3), chain, writable=True), tmp_path / "m") as root:
        for name in (".wh.f", ".wh..wh..opq", ".wh..wh.aufs"):
            for make in attempts:
                with pytest.raises(OSError, match="not permitted"):
                    make(root / name)
        (root / "plain").mkdir()
        (root / "plain/f").touch()
    driver.adopt(TreeId(3))
    on = (TreeId(3), *chain)
    with mounted(driver.mounts(TreeId(4), on, writable=False), tmp_path / "m") as root:
        assert (root / "plain/f").exists()


async def test_an_export_of_a_tree_in_use_takes_nothing_from_it(tmp_path: Path) -> None:
    layers = [layer([Entry("f", b"1"), Entry("g", b"1")]), layer([Entry("h", b"1")])]
    archive = write_docker_archive(tmp_path / "i.tar", "i:1", layers, image_config(layers))
    async with images_leaf(tmp_path / "images", driver="aufs") as leaf:
        await leaf.load(archive)
        made = await leaf.prepare("c", image="i:1")
        with mounted(made.mounts, tmp_path / "m") as root:
            (root / "f").unlink()
            data = [part.data async for part in leaf.snapshots.Export(pb.SnapshotRequest(key="c"))]
            with tarfile.open(fileobj=io.BytesIO(b"".join(data))) as tar:
                assert set(tar.getnames()) == {"g", "h"}
            (root / "g").unlink()
            (root / "f").write_text("2")
            assert {path.name for path in root.iterdir()} == {"f", "h"}
