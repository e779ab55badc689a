"""Bad archives, bad blobs and a full disk: one sentence that names the thing, and nothing left of it."""

import gzip
import io
import re
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.images import (
    Entry,
    busybox_layer,
    digest,
    image_config,
    layer,
    write_busybox,
    write_docker_archive,
    write_oci_archive,
)
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.requirements import needs
from support.tars import packed

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2 as types
from corral.rpc.errors import (
    CorralError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)

pytestmark = needs("root", "overlayfs")


async def refused(
    leaf: ImagesLeaf, data: bytes | Path, kind: type[CorralError] = InvalidArgument, **header: object
) -> str:
    """The one sentence with which the import is refused; nothing of it may be left."""
    before = leaf.disk()
    with pytest.raises(kind) as caught:
        await leaf.load(data, **({"name": "bad:1"} | header))
    await leaf.settled()
    assert leaf.disk() == before
    assert "bad:1" not in await leaf.names()
    sentence = caught.value.message
    assert sentence.isprintable(), sentence
    assert len(sentence) < 600
    return sentence


async def test_what_is_no_archive(leaf: ImagesLeaf) -> None:
    assert "not a tar archive" in await refused(leaf, b"this is no archive" * 100)
    assert "cut off" in await refused(leaf, b"")
    assert "bzip2 data is corrupt" in await refused(leaf, b"BZh91AY&SY" + bytes(1000))


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("form", ["docker", "oci"])
async def test_a_truncated_archive(leaf: ImagesLeaf, tmp_path: Path, form: str, part: float) -> None:
    data = write_busybox(tmp_path / "x.tar", form=form).read_bytes()
    sentence = await refused(leaf, data[: int(len(data.rstrip(b"\0")) * part)])
    assert "cut off" in sentence


async def test_a_truncated_compressed_archive(leaf: ImagesLeaf, tmp_path: Path) -> None:
    data = gzip.compress(write_busybox(tmp_path / "x.tar").read_bytes(), 1)
    assert "cut off" in await refused(leaf, data[: len(data) // 2])


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
async def test_a_truncated_root_file_system(leaf: ImagesLeaf, pack: Callable[[bytes], bytes]) -> None:
    data = pack(packed({"bin/a": b"x" * 5000, "bin/b": b"y" * 5000}).rstrip(b"\0"))
    assert "cut off" in await refused(leaf, data[:-20])


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
async def test_a_damaged_blob_is_named(leaf: ImagesLeaf, tmp_path: Path, where: float) -> None:
    layers = [busybox_layer()]
    data = bytearray(write_oci_archive(tmp_path / "x.tar", "x:1", layers, image_config(layers)).read_bytes())
    data[int(len(data) * where)] ^= 0x55
    assert re.search(r"blob sha256:[0-9a-f]{64} has other content", await refused(leaf, bytes(data)))


async def test_a_damaged_layer_of_a_docker_archive_is_named(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = [layer([Entry("f", b"x" * 1000)]), layer([Entry("g", b"y" * 1000)])]
    config = image_config(layers)
    other = [layers[0], layers[1].replace(b"yyyy", b"yyyz", 1)]
    sentence = await refused(leaf, write_docker_archive(tmp_path / "x.tar", "x:1", other, config))
    assert f"cannot unpack layer {digest(layers[1])}" in sentence
    assert digest(other[1]) in sentence


@pytest.mark.parametrize("form", [write_docker_archive, write_oci_archive])
async def test_a_layer_that_is_here_does_not_vouch_for_other_data(
    leaf: ImagesLeaf, tmp_path: Path, form: Callable[..., Path]
) -> None:
    layers = [layer([Entry("f", b"x" * 1000)])]
    await leaf.load(write_docker_archive(tmp_path / "good.tar", "good:1", layers, image_config(layers)))
    other = [layer([Entry("f", b"y" * 1000)])]
    sentence = await refused(leaf, form(tmp_path / "x.tar", "x:1", other, image_config(layers)))
    assert f"cannot take layer {digest(layers[0])}" in sentence
    await leaf.load(write_oci_archive(tmp_path / "good2.tar", "good:2", layers, image_config(layers)))


async def test_a_config_that_is_not_what_its_name_says(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = [layer([Entry("f", b"x")])]
    data = write_docker_archive(tmp_path / "x.tar", "x:1", layers, image_config(layers)).read_bytes()
    sentence = await refused(leaf, data.replace(b"corral tests", b"corral_tests"))
    assert "has the digest" in sentence


async def test_the_members_of_an_archive_may_be_missing(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = [layer([Entry("f", b"x")])]
    config = image_config(layers)
    whole = write_docker_archive(tmp_path / "d.tar", "x:1", layers, config)
    for missing in ("layer.tar", f"{digest(config)[7:]}.json"):
        assert "incomplete" in await refused(leaf, without(whole, missing))
    assert "no manifest.json" in await refused(leaf, without(whole, "manifest.json"))
    oci = write_oci_archive(tmp_path / "o.tar", "x:1", layers, config)
    assert "lacks blob" in await refused(leaf, without(oci, digest(config)[7:]))
    assert "lacks layer" in await refused(leaf, without(oci, digest(gzip.compress(layers[0], 6, mtime=0))[7:]))


def without(path: Path, ending: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(path) as source, tarfile.open(fileobj=buffer, mode="w") as target:
        for info in source:
            if not info.name.endswith(ending):
                target.addfile(info, source.extractfile(info))
    return buffer.getvalue()


async def test_too_many_layers_are_refused(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = [layer([])] * 501
    sentence = await refused(leaf, write_docker_archive(tmp_path / "x.tar", "x:1", layers, image_config(layers)))
    assert "at most 500" in sentence


@pytest.mark.parametrize("name", ["Bad", "a b", "x:", "../x", "sha256:" + "0" * 64])
async def test_a_bad_name_is_refused_before_anything_is_read(leaf: ImagesLeaf, name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not an image name"):
        await leaf.load(b"", name=name)


async def test_an_unknown_image_is_named_with_what_to_do(leaf: ImagesLeaf) -> None:
    for call in (
        leaf.images.Get(pb.GetImageRequest(name="nginx")),
        leaf.images.Remove(pb.RemoveImageRequest(name="nginx")),
        leaf.images.Tag(pb.TagImageRequest(source="nginx", target="x")),
        leaf.prepare("c", image="nginx"),
    ):
        with pytest.raises(NotFound, match=r"no image 'nginx' \(docker.io/library/nginx:latest\).*corral pull"):
            await call
    assert leaf.disk() == set()


async def test_a_blob_that_is_not_what_was_expected(leaf: ImagesLeaf) -> None:
    async def write(data: bytes, expected: types.Descriptor) -> pb.BlobInfo:
        async def requests() -> AsyncIterator[pb.WriteBlobRequest]:
            yield pb.WriteBlobRequest(expected=expected)
            yield pb.WriteBlobRequest(data=data)

        return await leaf.content.Write(requests())

    with pytest.raises(InvalidArgument, match="has the digest sha256:"):
        await write(b"other", types.Descriptor(digest=digest(b"data")))
    with pytest.raises(InvalidArgument, match="has 4 bytes instead of 5"):
        await write(b"data", types.Descriptor(digest=digest(b"data"), size_bytes=5))
    with pytest.raises(InvalidArgument, match="64 hex digits"):
        await write(b"data", types.Descriptor(digest="sha256:../../x"))
    assert leaf.disk() == set()


# A full disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A root of four mebibytes."""
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "corral-test", root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


@pytest.mark.parametrize(
    "sizes", [{"f": 6 << 20}, {"f": 2_600_000}, {f"f{i}": 4096 for i in range(520)}], ids=["take-in", "unpack", "many"]
)
async def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    small: Path, sizes: dict[str, int], tmp_path: Path
) -> None:
    data = packed({name: bytes(size) for name, size in sizes.items()})
    layers = [data]
    async with images_leaf(small / "images") as leaf:
        for archived in (write_docker_archive(tmp_path / "x.tar", "x:1", layers, image_config(layers)), data):
            sentence = await refused(leaf, archived, ResourceExhausted)
            assert "no space is left on the disk" in sentence
            assert "corral image prune" in sentence
        await leaf.load(packed({"f": b"x"}), name="tiny:1")
        assert await leaf.names() == ["tiny:1"]
        made = await leaf.prepare("c", image="tiny:1")
        with mounted(made.mounts, tmp_path / "m") as root:  # a tmpfs holds upper directories too
            (root / "f").write_text("changed")


async def test_a_disk_that_is_full_to_the_last_byte(small: Path) -> None:
    async with images_leaf(small / "images") as leaf:
        await leaf.load(packed({"f": b"x"}), name="tiny:1")
        await leaf.prepare("before", image="tiny:1")
        with pytest.raises(OSError, match="No space"):
            (small / "ballast").write_bytes(bytes(5 << 20))
        for attempt in range(30):
            with suppress(ResourceExhausted):  # a directory more may still fit
                await leaf.prepare(f"c{attempt}", image="tiny:1")
        await leaf.settled()
        await refused(leaf, packed({"g": b"y" * 10_000}), ResourceExhausted)
        (small / "ballast").unlink()
        await leaf.prepare("after", image="tiny:1")
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="before", must_exist=True))
