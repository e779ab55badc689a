"""Content may be named by sha512, the other algorithm that is registered; it is proven by that and keeps that name."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from support.faulty import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, Faulty
from support.faulty_images import fails
from support.images import Entry, image_config, layer
from support.images_leaf import ImagesLeaf, images_leaf
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.rpc.errors import InvalidArgument

pytestmark = needs("root", "overlayfs")

LAYERS = [layer([Entry("one", b"1" * 5000)]), layer([Entry("two", b"2" * 5000)])]


def sha512(data: bytes) -> str:
    return f"sha512:{hashlib.sha512(data).hexdigest()}"


def described(media_type: str, data: bytes, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": sha512(data), "size": len(data), **more}


def blobs() -> dict[str, bytes]:
    """An image of which everything is named by sha512, the layers in their config too; the manifest is the last."""
    config = json.loads(image_config(LAYERS))
    config["rootfs"]["diff_ids"] = [sha512(data) for data in LAYERS]
    encoded = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described(OCI_CONFIG, encoded),
        "layers": [described(OCI_LAYER, data) for data in LAYERS],
    }
    return {sha512(data): data for data in (*LAYERS, encoded, json.dumps(manifest).encode())}


def served(faulty: Faulty) -> str:
    """The image's name in an index, beside one for another platform that nobody has."""
    content = blobs()
    *_, manifest = content.values()
    faulty.blobs |= content
    faulty.manifests[sha512(manifest)] = (OCI_MANIFEST, manifest)
    entries = [
        described(OCI_MANIFEST, manifest, platform={"os": "linux", "architecture": "amd64"}),
        described(OCI_MANIFEST, b"?", platform={"os": "linux", "architecture": "s390x"}),
    ]
    faulty.add("1", OCI_INDEX, json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode())
    return f"{faulty.host}/x:1"


AMD64 = types_pb2.Platform(os="linux", architecture="amd64")


async def test_an_image_is_pulled_found_saved_and_loaded(leaf: ImagesLeaf, faulty: Faulty, tmp_path: Path) -> None:
    name = served(faulty)
    image = await leaf.pull(name, platform=AMD64)
    content = blobs()
    *_, config, manifest = content
    assert (image.id, image.manifest.digest) == (config, manifest)
    assert [each.diff_id for each in image.layers] == list(content)[:2]
    assert {path.name for path in (leaf.root / "blobs/sha512").iterdir()} == {digest[7:] for digest in content}
    for text in (image.id, image.id[:20], f"{faulty.host}/x@{manifest}"):
        assert (await leaf.images.Get(pb.GetImageRequest(name=text))).id == image.id
    assert not (await leaf.images.Check(types_pb2.CheckRequest(deep=True))).findings

    request = pb.ExportRequest(names=[name], platform=AMD64)
    archive = b"".join([part.data async for part in leaf.images.Export(request)])
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert {f"blobs/sha512/{digest[7:]}" for digest in content} < set(tar.getnames())
    async with images_leaf(tmp_path / "other") as other:
        [loaded] = await other.load(archive)
        assert (loaded.id, loaded.target.digest) == (image.id, manifest)


async def test_the_image_goes_with_its_blobs(leaf: ImagesLeaf, faulty: Faulty) -> None:
    name = served(faulty)
    await leaf.pull(name, platform=AMD64)
    await leaf.images.Remove(pb.RemoveImageRequest(name=name))
    await leaf.images.Prune(pb.PruneRequest())
    assert not list((leaf.root / "blobs/sha512").iterdir())


async def test_what_is_something_else_is_refused(leaf: ImagesLeaf, faulty: Faulty) -> None:
    name = served(faulty)
    digest = sha512(LAYERS[0])
    faulty.blobs[digest] = LAYERS[0][:-1] + b"!"
    await fails(leaf, name, InvalidArgument, f"{digest} with the digest sha512:", platform=AMD64)


async def test_a_blob_is_written_under_it(leaf: ImagesLeaf) -> None:
    request = pb.WriteBlobRequest(expected=types_pb2.Descriptor(digest=sha512(b"x")), data=b"x")
    assert (await leaf.content.Write(iter([request]))).digest == sha512(b"x")
    wrong = pb.WriteBlobRequest(expected=types_pb2.Descriptor(digest=sha512(b"y")), data=b"x")
    with pytest.raises(InvalidArgument, match="instead of sha512:"):
        await leaf.content.Write(iter([wrong]))
