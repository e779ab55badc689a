"""Blobs that are not kept are there all the same: for exports, pushes, reads, other drivers, with the same digests."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zstandard
from support.file_systems import FileSystems
from support.images import Entry, digest, image_config, layer, symlink, write_docker_archive, write_oci_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.registry import running
from support.requirements import needs
from support.snapshotters import CASES, case_id, place_for

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.rpc.errors import FailedPrecondition

pytestmark = needs("root", "overlayfs")

TEXT = b"".join(b"line %d\n" % i for i in range(20_000))
LAYERS = [
    layer([Entry("etc/text", TEXT), Entry("big", bytes(range(256)) * 800), symlink("link", "big")]),
    layer([Entry("etc/text", TEXT[::-1]), Entry("etc/.wh.gone"), Entry("more", b"m" * 5000)]),
]


@pytest.fixture
async def leaf(tmp_path: Path) -> AsyncIterator[ImagesLeaf]:
    async with images_leaf(tmp_path / "images", keep_blobs=False) as made:
        yield made


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_docker_archive(tmp_path / "d.tar", "x:1", LAYERS, image_config(LAYERS))


@pytest.fixture
def gzipped(tmp_path: Path) -> Path:
    return write_oci_archive(tmp_path / "o.tar", "x:1", LAYERS, image_config(LAYERS))


def files(leaf: ImagesLeaf, directory: str = "blobs/sha256") -> set[str]:
    return {f"sha256:{path.name}" for path in (leaf.root / directory).iterdir()}


def layer_blobs(image: pb.Image) -> set[str]:
    return {one.blob.digest for one in image.layers}


async def exported(leaf: ImagesLeaf, name: str = "x:1") -> bytes:
    request = pb.ExportRequest(names=[name])
    return b"".join([part.data async for part in leaf.images.Export(request)])


async def read(leaf: ImagesLeaf, blob: str) -> bytes:
    return b"".join([chunk.data async for chunk in leaf.content.Read(pb.ReadBlobRequest(digest=blob))])


async def nothing_is_wrong(leaf: ImagesLeaf) -> bool:
    return not (await leaf.images.Check(types_pb2.CheckRequest())).findings


@pytest.mark.parametrize("form", ["plain", "gzipped"])
async def test_an_archive_goes_out_as_it_came(form: str, leaf: ImagesLeaf, request: pytest.FixtureRequest) -> None:
    archive: Path = request.getfixturevalue(form)
    [kept] = await leaf.load(archive, keep_blobs=True)
    before = await exported(leaf)
    assert layer_blobs(kept) <= files(leaf)
    [image] = await leaf.load(archive)
    assert image.target.digest == kept.target.digest
    assert files(leaf, "recipes") == layer_blobs(image)
    assert not layer_blobs(image) & files(leaf)
    assert await exported(leaf) == before
    for one in image.layers:
        assert digest(await read(leaf, one.blob.digest)) == one.blob.digest
    assert not layer_blobs(image) & files(leaf)
    assert await nothing_is_wrong(leaf)


async def test_part_of_a_blob_can_be_read_and_two_can_read_at_once(leaf: ImagesLeaf, plain: Path) -> None:
    [image] = await leaf.load(plain)
    blob = image.layers[0].blob.digest
    first, second = leaf.content.Read(pb.ReadBlobRequest(digest=blob)), read(leaf, blob)
    assert await anext(aiter(first)) is not None
    assert digest(await second) == blob
    first.cancel()
    part = leaf.content.Read(pb.ReadBlobRequest(digest=blob, offset=512, length=10))
    assert b"".join([chunk.data async for chunk in part]) == LAYERS[0][512:522]


async def test_less_is_on_disk_and_df_says_how_much(leaf: ImagesLeaf, plain: Path) -> None:
    await leaf.load(plain)
    usage = await leaf.images.DiskUsage(pb.DiskUsageRequest())
    on_disk = sum(p.stat().st_size for above in ("blobs/sha256", "recipes") for p in (leaf.root / above).iterdir())
    assert usage.blobs.size_bytes == on_disk < sum(map(len, LAYERS)) / 20
    pruned = await leaf.images.Prune(pb.PruneRequest(all=True))
    assert pruned.reclaimed_bytes == usage.images_reclaimable_bytes
    assert files(leaf) == files(leaf, "recipes") == set()


async def test_what_nobody_here_could_compress_alike_is_kept(leaf: ImagesLeaf, tmp_path: Path) -> None:
    stored = [zstandard.compress(LAYERS[0]), gzip.compress(LAYERS[1])]
    archive = write_layers_as(tmp_path / "z.tar", stored)
    [image] = await leaf.load(archive)
    zstd, zlib = (one.blob.digest for one in image.layers)
    assert zstd in files(leaf)
    assert files(leaf, "recipes") == {zlib}
    assert digest(await read(leaf, zlib)) == zlib


def write_layers_as(path: Path, stored: list[bytes]) -> Path:
    """An OCI archive of LAYERS, compressed as given."""
    blobs = {digest(data): data for data in stored}

    def put(kind: str, data: bytes) -> dict[str, object]:
        blobs[digest(data)] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest(data), "size": len(data)}

    layers = [put("layer.v1.tar+zstd", stored[0]), put("layer.v1.tar+gzip", stored[1])]
    config = put("config.v1+json", image_config(LAYERS))
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers}
    entry = put("manifest.v1+json", json.dumps(manifest).encode())
    entry["annotations"] = {"org.opencontainers.image.ref.name": "x:1"}
    members = {f"blobs/sha256/{name[7:]}": data for name, data in blobs.items()}
    members["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
    members["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@needs("docker-registry")
async def test_a_push_brings_the_same_digests(leaf: ImagesLeaf, gzipped: Path, tmp_path: Path) -> None:
    [image] = await leaf.load(gzipped)
    with running(tmp_path / "registry") as registry:
        name = f"{registry.host}/x:1"
        assert await leaf.push("x:1", name) == image.target.digest
        assert not layer_blobs(image) & files(leaf)
        async with images_leaf(tmp_path / "other", keep_blobs=True) as other:
            pulled = await other.pull(name, keep_blobs=False)
            assert pulled.target.digest == image.target.digest
            assert files(other, "recipes") == layer_blobs(image)
            again = await other.pull_all(name)
            assert again[-1].image.target.digest == image.target.digest
            assert not layer_blobs(image) & files(other)


@pytest.mark.parametrize("case", CASES, ids=case_id)
async def test_every_driver_s_layers_give_blobs_back(
    case: tuple[str, str], gzipped: Path, tmp_path: Path, file_systems: FileSystems
) -> None:
    root = place_for(case, tmp_path, file_systems) / "images"
    async with images_leaf(root, driver=case[0], keep_blobs=False) as leaf:
        [image] = await leaf.load(gzipped)
        assert files(leaf, "recipes") == layer_blobs(image)
        for one in image.layers:
            assert digest(await read(leaf, one.blob.digest)) == one.blob.digest


async def test_another_driver_unpacks_what_it_makes_of_the_first_one_s(tmp_path: Path, gzipped: Path) -> None:
    root = tmp_path / "images"
    async with images_leaf(root, keep_blobs=False) as leaf:
        [image] = await leaf.load(gzipped)
    async with images_leaf(root, driver="native", keep_blobs=False) as leaf:
        await leaf.images.Prune(pb.PruneRequest())
        made = await leaf.prepare("c", image="x:1")
        with mounted(made.mounts, tmp_path / "m") as mount:
            assert (mount / "etc/text").read_bytes() == TEXT[::-1]
        assert digest(await read(leaf, image.layers[0].blob.digest)) == image.layers[0].blob.digest
        assert await nothing_is_wrong(leaf)


async def test_a_layer_that_was_changed_makes_no_blob(leaf: ImagesLeaf, plain: Path) -> None:
    [image] = await leaf.load(plain)
    for path in (leaf.root / "overlay/l").glob("*/big"):
        path.write_bytes(b"changed" + path.read_bytes()[7:])
    with pytest.raises(FailedPrecondition, match=r"cannot be made again, for its layer was changed.*pull or import"):
        await read(leaf, image.layers[0].blob.digest)
    assert not layer_blobs(image) & files(leaf)


async def test_a_lost_database_finds_what_was_not_kept(tmp_path: Path, gzipped: Path) -> None:
    root = tmp_path / "images"
    async with images_leaf(root, keep_blobs=False) as leaf:
        [image] = await leaf.load(gzipped)
        before = await exported(leaf)
    (root / "images.db").unlink()
    async with images_leaf(root, keep_blobs=False) as leaf:
        await leaf.images.Check(types_pb2.CheckRequest(repair=True))
        assert await leaf.names() == ["x:1"]
        assert await exported(leaf) == before
        assert await nothing_is_wrong(leaf)
        removed = await leaf.images.Remove(pb.RemoveImageRequest(name="x:1"))
        assert len(removed.deleted) == 6
        assert files(leaf) == files(leaf, "recipes") == set()
        await leaf.load(gzipped)
    async with images_leaf(root, keep_blobs=False) as leaf:
        assert files(leaf, "recipes") == layer_blobs(image)
        shutil.rmtree(root / "recipes")
        (root / "recipes").mkdir()
        assert not await nothing_is_wrong(leaf)


async def test_layers_and_blobs_that_are_both_lost_are_told_and_forgotten(leaf: ImagesLeaf, plain: Path) -> None:
    [image] = await leaf.load(plain)
    for path in (leaf.root / "overlay/l").iterdir():
        shutil.rmtree(path)
    findings = (await leaf.images.Check(types_pb2.CheckRequest(repair=True))).findings
    assert {one.subject for one in findings} >= {f"layer {one.chain_id}" for one in image.layers}
    assert all(one.repaired for one in findings)
    assert await nothing_is_wrong(leaf)
    await leaf.load(plain)
    assert digest(await read(leaf, image.layers[0].blob.digest)) == image.layers[0].blob.digest
