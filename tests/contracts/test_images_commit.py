"""What was written on top of an image becomes a layer, and an image, over gRPC."""

import io
import json
import os
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
from support.images import Entry, directory, image_config, layer, symlink, write_docker_archive, write_oci_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.registry import podman, run
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.images.layers.packing import packed
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound

pytestmark = needs("root", "overlayfs")

CAP_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
LETTERS = {1: "A", 2: "C", 3: "D"}


@pytest.fixture
async def base(leaf: ImagesLeaf, tmp_path: Path) -> pb.Image:
    """An image of two layers."""
    layers = [
        layer(
            [
                directory("etc"),
                Entry("etc/passwd", b"root"),
                directory("old"),
                Entry("old/a", b"1"),
                symlink("s", "etc"),
            ]
        ),
        layer([Entry("etc/gone", b"x"), Entry("bin", b"#!", 0o755), directory("kept"), Entry("kept/f", b"2")]),
    ]
    config = image_config(layers, User="app", Shell=["/bin/ash"])
    [image] = await leaf.load(write_oci_archive(tmp_path / "b.tar", "base:1", layers, config))
    return image


def write(root: Path) -> None:
    """What a container might do."""
    (root / "etc/passwd").write_bytes(b"root and more")
    (root / "etc/gone").unlink()
    (root / "old/a").unlink()
    (root / "old").rmdir()
    (root / "old").mkdir(0o700)
    (root / "old/new").write_bytes(b"n")
    (root / "new").mkdir()
    (root / "new/one").write_bytes(b"linked")
    os.link(root / "new/one", root / "new/two")
    os.setxattr(root / "bin", "security.capability", CAP_NET_RAW)
    os.mkfifo(root / "new/fifo")
    os.mknod(root / "new/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chown(root / "new/two", 1000, 3_000_000)
    (root / "new/link").symlink_to("../etc")


async def changed(leaf: ImagesLeaf, where: Path, key: str = "c", image: str = "base:1") -> None:
    made = await leaf.prepare(key, image=image)
    with mounted(made.mounts, where) as root:
        write(root)


async def commit(leaf: ImagesLeaf, name: str = "made:1", key: str = "c", **request: object) -> pb.Image:
    return await leaf.images.Commit(pb.CommitImageRequest(key=key, name=name, **request))  # type: ignore[arg-type]


def look(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a root that a program could see."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        facts = stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, content
        found[str(path.relative_to(root))] = facts
    return found


async def test_the_image_made_is_what_the_container_saw(leaf: ImagesLeaf, base: pb.Image, tmp_path: Path) -> None:
    await changed(leaf, tmp_path / "m")
    with mounted((await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c"))).mounts, tmp_path / "m") as root:
        before = look(root)
    image = await commit(leaf)
    made = await leaf.prepare("again", image="made:1")
    with mounted(made.mounts, tmp_path / "m") as root:
        assert look(root) == before
        assert (root / "new/one").stat().st_ino == (root / "new/two").stat().st_ino
        assert os.getxattr(root / "bin", "security.capability") == CAP_NET_RAW
        assert [path.name for path in (root / "old").iterdir()] == ["new"]
    assert [part.diff_id for part in image.layers][:2] == [part.diff_id for part in base.layers]
    assert len(image.layers) == 3


async def test_the_config_is_the_new_one_and_the_rest_of_the_old(
    leaf: ImagesLeaf, base: pb.Image, tmp_path: Path
) -> None:
    await changed(leaf, tmp_path / "m")
    config = pb.ImageConfig(cmd=["top"], env=["A=1"], labels={"k": "v"}, exposed_ports=["80/tcp"])
    image = await commit(leaf, config=config, author="ann", comment="why", created_by="sh -c x")
    assert image.config == config
    last = image.history[-1]
    assert (last.author, last.comment, last.created_by, last.empty_layer) == ("ann", "why", "sh -c x", False)
    assert len(image.history) == 3
    document = json.loads((leaf.root / "blobs/sha256" / image.id[7:]).read_bytes())
    assert document["config"]["Shell"] == ["/bin/ash"]
    assert "User" not in document["config"]
    assert document["author"] == "ann"


async def test_changes_are_told_as_docker_tells_them(leaf: ImagesLeaf, base: pb.Image, tmp_path: Path) -> None:
    await changed(leaf, tmp_path / "m")
    parts = [part async for part in leaf.snapshots.Changes(pb.SnapshotRequest(key="c"))]
    found = {change.path: LETTERS[change.kind] for part in parts for change in part.changes}
    assert found == {
        "/bin": "C", "/etc": "C", "/etc/passwd": "C", "/etc/gone": "D", "/old": "C", "/old/new": "A", "/new": "A",
        "/new/one": "A", "/new/two": "A", "/new/fifo": "A", "/new/null": "A", "/new/link": "A",
    }  # fmt: skip


async def test_a_commit_on_a_commit_and_one_without_an_image(leaf: ImagesLeaf, base: pb.Image, tmp_path: Path) -> None:
    await changed(leaf, tmp_path / "m")
    await commit(leaf)
    made = await leaf.prepare("second", image="made:1")
    with mounted(made.mounts, tmp_path / "m") as root:
        (root / "more").write_bytes(b"m")
    image = await commit(leaf, "more:1", "second")
    assert len(image.layers) == 4
    empty = await leaf.prepare("empty")
    with mounted(empty.mounts, tmp_path / "m") as root:
        (root / "f").write_bytes(b"f")
    alone = await commit(leaf, "", "empty")
    assert (alone.name, len(alone.layers)) == ("", 1)


async def test_an_image_of_docker_media_types_becomes_an_oci_one(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = [layer([directory("etc"), Entry("etc/passwd", b"root")])]
    await leaf.load(write_docker_archive(tmp_path / "d.tar", "d:1", layers, image_config(layers)))
    made = await leaf.prepare("c", image="d:1")
    with mounted(made.mounts, tmp_path / "m") as root:
        (root / "f").write_bytes(b"f")
    image = await commit(leaf)
    assert {part.blob.media_type.partition("+")[0] for part in image.layers} == {
        "application/vnd.oci.image.layer.v1.tar"
    }


async def test_what_cannot_be_committed_says_why(leaf: ImagesLeaf, base: pb.Image, tmp_path: Path) -> None:
    before = leaf.disk()
    with pytest.raises(NotFound):
        await commit(leaf, key="absent")
    await leaf.view("look", image="base:1")
    with pytest.raises(FailedPrecondition, match="not an active one"):
        await commit(leaf, key="look")
    await leaf.prepare("c", image="base:1")
    with pytest.raises(InvalidArgument, match="not an image name"):
        await commit(leaf, "BAD")
    await leaf.images.Remove(pb.RemoveImageRequest(name="base:1", force=True))
    with pytest.raises(FailedPrecondition, match="not here any more"):
        await commit(leaf)
    assert {path for path in leaf.disk() if path.startswith("ingest/")} == set()
    assert before


async def whole(leaf: ImagesLeaf, key: str) -> bytes:
    return b"".join([part.data async for part in leaf.snapshots.Export(pb.SnapshotRequest(key=key))])


async def test_a_whole_tree_is_exported_while_it_is_mounted(leaf: ImagesLeaf, base: pb.Image, tmp_path: Path) -> None:
    made = await leaf.prepare("c", image="base:1")
    with mounted(made.mounts, tmp_path / "m") as root:
        write(root)
        before = look(root)
        data = await whole(leaf, "c")
    assert look(extracted(data, tmp_path / "out")) == before
    assert data == await whole(leaf, "c")


async def test_a_view_and_a_tree_on_nothing_are_exported_too(leaf: ImagesLeaf, base: pb.Image, tmp_path: Path) -> None:
    await leaf.view("look", image="base:1")
    with tarfile.open(fileobj=io.BytesIO(await whole(leaf, "look"))) as tar:
        assert {"etc/passwd", "kept/f", "s"} < set(tar.getnames())
    empty = await leaf.prepare("empty")
    with mounted(empty.mounts, tmp_path / "m") as root:
        (root / "f").write_bytes(b"f")
    with tarfile.open(fileobj=io.BytesIO(await whole(leaf, "empty"))) as tar:
        assert tar.getnames() == ["f"]
    with pytest.raises(FailedPrecondition, match="committed"):
        await whole(leaf, base.chain_id)
    assert not any(path.startswith("ingest/") for path in leaf.disk())


@needs("podman")
async def test_podman_unpacks_what_was_committed(leaf: ImagesLeaf, base: pb.Image, tmp_path: Path) -> None:
    await changed(leaf, tmp_path / "m")
    image = await commit(leaf)
    request = pb.ExportRequest(names=["made:1"])
    archive = tmp_path / "made.tar"
    archive.write_bytes(b"".join([part.data async for part in leaf.images.Export(request)]))
    with podman(tmp_path / "podman") as command:
        run([*command, "load", "-q", "-i", archive])
        run([*command, "create", "--name", "c", "docker.io/library/made:1", "x"])
        run([*command, "export", "-o", tmp_path / "x.tar", "c"])
        shown = json.loads(run([*command, "image", "inspect", "made:1"]).stdout)
    assert f"sha256:{shown[0]['Id']}" == image.id
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = set(tar.getnames())
        link = next(member for member in tar if member.name in ("new/one", "new/two") and member.islnk())
    assert {"new/one", "new/null", "new/link", "old/new", "kept/f"} < names
    assert not {"etc/gone", "old/a"} & names
    assert link.linkname in ("new/one", "new/two")


@needs("erofs")
async def test_layers_that_are_images_are_below_changes_too(tmp_path: Path) -> None:
    async with images_leaf(tmp_path / "images", driver="erofs") as leaf:
        layers = [layer([directory("etc"), Entry("etc/passwd", b"root")]), layer([Entry("f", b"2")])]
        await leaf.load(write_docker_archive(tmp_path / "d.tar", "base:1", layers, image_config(layers)))
        await leaf.prepare("c", image="base:1")
        parts = [part async for part in leaf.snapshots.Changes(pb.SnapshotRequest(key="c"))]
        assert parts == []
        assert len((await commit(leaf)).layers) == 3
        with tarfile.open(fileobj=io.BytesIO(await whole(leaf, "c"))) as tar:
            assert tar.getnames() == ["f", "etc", "etc/passwd"]


# The tar itself


def extracted(data: bytes, where: Path) -> Path:
    """Unpacked by GNU tar."""
    where.mkdir()
    subprocess.run(["tar", "-xpf", "-", "-C", where, "--numeric-owner"], input=data, check=True)
    return where


def pack(root: Path) -> bytes:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return b"".join(packed(fd))
    finally:
        os.close(fd)


def test_the_same_tree_gives_the_same_bytes_wherever_it_is(tmp_path: Path) -> None:
    archives = []
    for place, order in (("a", range(50)), ("b", reversed(range(50)))):
        root = tmp_path / place
        root.mkdir()
        for i in order:
            (root / f"d{i}").mkdir()
            (root / f"d{i}/f{i}").write_bytes(b"x" * i)
            os.setxattr(root / f"d{i}/f{i}", "user.b", b"2")
            os.setxattr(root / f"d{i}/f{i}", "user.a", b"1")
        for path in sorted(root.rglob("*"), reverse=True):
            os.utime(path, (1_000_000, 1_000_000))
        archives.append(pack(root))
    assert archives[0] == archives[1]


def test_other_programs_read_names_numbers_and_links_as_they_were(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d" / ("n" * 120)).mkdir(parents=True)
    odd = os.fsencode(root) + b"/d/\xff\xfe"
    Path(os.fsdecode(odd)).write_bytes(b"odd")
    (root / "d" / ("n" * 120) / "ü").write_bytes(b"long")
    (root / "l").symlink_to("t" * 150)
    os.chown(root / "d", 4_000_000, 5_000_000)
    archive = tmp_path / "x.tar"
    archive.write_bytes(pack(root))
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xpf", archive, "-C", tmp_path / "out", "--numeric-owner"], check=True)
    assert look(tmp_path / "out") == look(root)


def test_a_sparse_file_stays_one_and_its_archive_is_small(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with (root / "sparse").open("wb") as file:
        file.seek(1 << 30)
        file.write(b"middle")
        file.truncate(8 << 40)
    (root / "hole").touch()
    os.truncate(root / "hole", 5 << 30)
    data = pack(root)
    assert len(data) < 100_000
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {member.name: member.size for member in tar} == {"sparse": 8 << 40, "hole": 5 << 30}
    (tmp_path / "x.tar").write_bytes(data)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "x.tar", "-C", tmp_path / "out"], check=True)
    assert (tmp_path / "out/sparse").stat().st_size == 8 << 40
    assert (tmp_path / "out/sparse").stat().st_blocks < 1000
    with (tmp_path / "out/sparse").open("rb") as file:
        file.seek(1 << 30)
        assert file.read(7) == b"middle\0"


async def test_a_sparse_file_comes_through_a_commit(leaf: ImagesLeaf, base: pb.Image, tmp_path: Path) -> None:
    made = await leaf.prepare("c", image="base:1")
    with mounted(made.mounts, tmp_path / "m") as root, (root / "sparse").open("wb") as file:
        file.seek(3 << 30)
        file.write(b"end")
    image = await commit(leaf)
    assert image.layers[-1].blob.size_bytes < 100_000
    made = await leaf.prepare("again", image="made:1")
    with mounted(made.mounts, tmp_path / "m") as root, (root / "sparse").open("rb") as file:
        assert file.seek(0, os.SEEK_END) == (3 << 30) + 3
        file.seek(3 << 30)
        assert file.read() == b"end"


def test_links_of_the_tree_lead_nowhere_out_of_it(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"SECRET")
    root = tmp_path / "root"
    root.mkdir()
    (root / "d").symlink_to(secret)
    (root / "f").symlink_to(secret / "key")
    data = pack(root)
    assert b"SECRET" not in data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {member.name: member.linkname for member in tar} == {"d": str(secret), "f": f"{secret}/key"}


def test_a_directory_that_becomes_a_link_meanwhile_is_left_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"SECRET")
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "c").touch()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        archive = packed(fd)
        got = [next(archive)]  # of "c"; that "b" is a directory was seen by then
        (root / "b").rename(tmp_path / "aside")
        (root / "b").symlink_to(secret)
        got += archive
    finally:
        os.close(fd)
    data = b"".join(got)
    assert b"SECRET" not in data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["c"]


def test_whiteouts_and_opaque_directories_are_written_as_the_specification_has_them(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    os.setxattr(root / "d", "trusted.overlay.opaque", b"y")
    os.setxattr(root / "d", "trusted.overlay.origin", b"x")
    os.mknod(root / "d/gone", stat.S_IFCHR, os.makedev(0, 0))
    with tarfile.open(fileobj=io.BytesIO(pack(root))) as tar:
        assert tar.getnames() == ["d", "d/.wh..wh..opq", "d/.wh.gone"]
        assert all(not member.pax_headers for member in tar)
