"""An image looks the same whichever driver its layers are stacked by."""

import asyncio
import os
import random
import struct
import tarfile
from pathlib import Path

import pytest
from support.file_systems import FileSystems
from support.fingerprint import Fingerprint, fingerprint
from support.images import Entry, directory, image_config, layer, symlink, write_docker_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.requirements import needs
from support.snapshotters import CASES, case_id, place_for
from support.tars import archive, member, pax

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.images.drivers.places import kernel_has
from corral.rpc.errors import FailedPrecondition

pytestmark = needs("root", "overlayfs")

# cap_net_raw+ep, VFS_CAP_REVISION_2. Source: linux/capability.h.
PING_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0).decode("latin-1")


def whiteout(path: str) -> Entry:
    head, _, name = path.rpartition("/")
    return Entry(f"{head}/.wh.{name}" if head else f".wh.{name}")


def opaque(path: str) -> Entry:
    return Entry(f"{path}/.wh..wh..opq")


def hardlink(name: str, target: str) -> Entry:
    return Entry(name, kind=tarfile.LNKTYPE, link=target)


LONG = "n" * 255
BOTTOM = [
    directory("./", 0o751),
    directory("etc", 0o755),
    Entry("etc/passwd", b"root", 0o644, pax={"mtime": "1234567890.987654321"}),
    Entry("etc/secret", b"s", 0o4711, uid=1000, gid=50),
    directory("opt", 0o2775, uid=7),
    Entry("opt/a", b"a"),
    Entry("opt/b", b"b"),
    directory("opt/kept"),
    Entry("opt/kept/old", b"old"),
    directory("gone"),
    Entry("gone/deep/er", b"x"),
    Entry("big", random.Random(1).randbytes(3_000_000)),
    hardlink("big-too", "big"),
    hardlink("opt/big-as-well", "big"),
    symlink("lib", "usr/lib"),
    symlink("nowhere", "/does/not/exist"),
    Entry("null", b"", 0o666, tarfile.CHRTYPE, device=(1, 3)),
    Entry("disk", b"", 0o660, tarfile.BLKTYPE, device=(7, 123), gid=6),
    Entry("pipe", b"", 0o600, tarfile.FIFOTYPE),
    Entry("ping", b"p", 0o755, pax={"SCHILY.xattr.security.capability": PING_CAPABILITY}),
    Entry("noted", b"n", pax={"SCHILY.xattr.user.note": "hello", "SCHILY.xattr.trusted.overlay.redirect": "/etc"}),
    Entry(LONG, b"long"),
    Entry("ünïcode/" + "d" * 200 + "/" + "e" * 200, b"deep"),
    Entry("lib/through-a-link", b"l"),
    Entry("becomes-a-directory", b"f"),
    directory("becomes-a-file"),
    Entry("becomes-a-file/inside", b"i"),
    Entry("owned-by-many", b"", 0o600, uid=3_000_000, gid=4_000_000),
]
MIDDLE = [
    whiteout("gone"),
    whiteout("opt/a"),
    opaque("opt/kept"),
    Entry("opt/kept/new", b"new"),
    Entry("usr/lib/more", b"m"),  # usr and usr/lib are as they are below
    Entry("etc/passwd", b"root, and others"),
    whiteout("becomes-a-directory"),
    directory("becomes-a-directory", 0o700),
    Entry("becomes-a-directory/inside", b"i"),
    Entry("becomes-a-file", b"f"),
    hardlink("opt/second-name-of-big", "big"),
    symlink("etc/secret", "passwd"),
]
TOP = [
    directory("gone", 0o711, uid=3),
    Entry("gone/again", b"g"),
    whiteout("big-too"),
    whiteout("not-there-at-all"),
    Entry("opt/kept/new", b"newer"),
    Entry("opt/b", b""),
]
# A hole of 64 MiB with a byte on either side of it.
SPARSE = archive(
    pax(
        {
            b"GNU.sparse.major": b"1",
            b"GNU.sparse.minor": b"0",
            b"GNU.sparse.name": b"holes",
            b"GNU.sparse.realsize": b"67108865",
        }
    ),
    member(b"GNUSparseFile/holes", b"2\n0\n1\n67108864\n1\n".ljust(512, b"\0") + b"ab"),
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("image") / "i.tar", layers_for("overlayfs"))


def layers_for(driver: str) -> list[bytes]:
    """Without a name that is too long for it."""
    bottom = [entry for entry in BOTTOM if driver != "aufs" or entry.name != LONG]
    return [layer(bottom), SPARSE, layer(MIDDLE), layer(TOP)]


def write_image(path: Path, layers: list[bytes]) -> Path:
    return write_docker_archive(path, "i:1", layers, image_config(layers))


async def looks(leaf: ImagesLeaf, at: Path, *, writable: bool) -> Fingerprint:
    make = leaf.prepare if writable else leaf.view
    made = await make(f"t{writable:d}", image="i:1")
    with mounted(made.mounts, at) as root:
        with (root / "holes").open("rb") as file:  # some tell of holes by their blocks, some by where they are
            hole = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
            assert 0 < hole < 1 << 20 or os.fstat(file.fileno()).st_blocks < 1000 or are_small_images(leaf.root)
        found = fingerprint(root)
    kind, uid, gid, _, *rest = found["."]  # the root of a writable overlay is as old as its upper directory
    return {**found, ".": (kind, uid, gid, *rest)}


def are_small_images(root: Path) -> bool:
    """EROFS of Linux 6.12 tells of holes in neither way."""
    return 0 < sum(path.stat().st_blocks * 512 for path in root.glob("erofs/i/*")) < 16 << 20


@pytest.fixture(scope="module")
def reference(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Fingerprint:
    """As overlayfs shows it."""
    directory = tmp_path_factory.mktemp("reference")

    async def look() -> Fingerprint:
        async with images_leaf(directory / "root") as leaf:
            await leaf.load(image)
            return await looks(leaf, directory / "m", writable=False)

    return asyncio.run(look())


@pytest.fixture(params=CASES, ids=case_id)
def place(request: pytest.FixtureRequest, tmp_path: Path, file_systems: FileSystems) -> tuple[str, Path]:
    return request.param[0], place_for(request.param, tmp_path, file_systems)


async def test_an_image_is_the_same_with_every_driver(
    place: tuple[str, Path], reference: Fingerprint, tmp_path: Path
) -> None:
    name, root = place
    async with images_leaf(root / "root", driver=name) as leaf:
        await leaf.load(write_image(tmp_path / "image.tar", layers_for(name)))
        for writable in (True, False):
            found, wanted = await looks(leaf, tmp_path / "m", writable=writable), reference
            if name == "aufs":
                wanted = {key: value for key, value in wanted.items() if key != LONG}
            if name == "fuse-overlayfs":  # it shows the names of one file as files of their own
                found, wanted = ({key: value[:6] for key, value in each.items()} for each in (found, wanted))
            assert {key: found.get(key) for key in wanted} == wanted
            assert found.keys() == wanted.keys()


async def test_layers_that_are_here_are_not_unpacked_again(place: tuple[str, Path], tmp_path: Path) -> None:
    name, root = place
    async with images_leaf(root / "root", driver=name) as leaf:
        await leaf.load(write_image(tmp_path / "image.tar", layers_for(name)))
        more = [*layers_for(name), layer([Entry("on-top", b"t")])]
        other = write_docker_archive(tmp_path / "j.tar", "j:1", more, image_config(more))
        said = await leaf.load_all(other)
        steps = [(part.progress.item, part.progress.step) for part in said if part.HasField("progress")]
        assert len({item for item, step in steps if step == types_pb2.Progress.STEP_EXISTS}) == 4
        made = await leaf.prepare("c", image="j:1")
        with mounted(made.mounts, tmp_path / "m") as mounted_root:
            assert (mounted_root / "on-top").read_text() == "t"
            assert (mounted_root / "opt/kept/new").read_text() == "newer"


async def test_trees_of_another_driver_stay_usable_and_removable(image: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with images_leaf(root) as leaf:
        await leaf.load(image)
        made = await leaf.prepare("old", image="i:1")
        with mounted(made.mounts, tmp_path / "m") as tree:
            (tree / "mine").write_text("x")
    async with images_leaf(root, driver="native") as leaf:
        again = await leaf.prepare("old", image="i:1")
        assert (again.driver, list(again.mounts)) == ("overlayfs", list(made.mounts))
        new = await leaf.prepare("new", image="i:1")
        assert new.driver == "native"
        with mounted(again.mounts, tmp_path / "m") as tree:
            assert (tree / "mine").read_text() == "x"
            assert not (tree / "gone/deep").exists()
        await leaf.snapshots.Commit(pb.CommitSnapshotRequest(key="old", name="stage"))
        above = await leaf.prepare("above", parent="stage")
        assert above.driver == "overlayfs"
        for key in ("above", "stage", "new"):
            await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key, must_exist=True))
        await leaf.settled()
        assert {path.split("/")[1] for path in leaf.disk() if path.startswith("overlay")} == {"l"}
        await leaf.images.Prune(pb.PruneRequest())  # nothing needs the old driver's layers any more
        await leaf.settled()
        assert not [path for path in leaf.disk() if path.startswith("overlay")]


async def test_a_driver_that_does_not_exist_or_cannot_run_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no snapshot driver 'best'; there is overlayfs, "):
        async with images_leaf(tmp_path / "root", driver="best"):
            pass
    if not kernel_has("aufs"):
        with pytest.raises(FailedPrecondition, match="aufs cannot be used: this kernel has no aufs"):
            async with images_leaf(tmp_path / "root", driver="aufs"):
                pass
    with pytest.raises(FailedPrecondition, match="overlayfs cannot be used: overlayfs takes no"):
        async with images_leaf(tmp_path / "a:b", driver="overlayfs"):
            pass
