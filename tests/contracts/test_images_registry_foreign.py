"""Layers that registries may not pass on come from where their descriptor says."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support.faulty import OCI_MANIFEST, Faulty, Handler, Seen, manifest_of
from support.faulty_images import SECRETS, fails, login_wanted
from support.images import Entry, digest, image_config, layer
from support.images_leaf import ImagesLeaf, images_leaf
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.rpc.errors import InvalidArgument, NotFound

pytestmark = needs("root", "overlayfs")

FOREIGN = layer([Entry("theirs", b"x" * 5000)])
OURS = layer([Entry("ours", b"y" * 5000)])


@pytest.fixture
async def leaf(tmp_path: Path) -> AsyncIterator[ImagesLeaf]:
    async with images_leaf(tmp_path / "images", certs=tmp_path / "certs.d") as made:
        yield made


def served(faulty: Faulty, *urls: str) -> str:
    """An image whose lower layer the registry has not."""
    layers = [FOREIGN, OURS]
    manifest = json.loads(manifest_of(faulty, layers, image_config(layers)))
    kind = "application/vnd.docker.image.rootfs.foreign.diff.tar"
    manifest["layers"][0] |= {"mediaType": kind, "urls": list(urls)}
    del faulty.blobs[digest(FOREIGN)]
    faulty.add("1", OCI_MANIFEST, json.dumps(manifest).encode())
    return f"{faulty.host}/x:1"


def gives(data: bytes) -> Callable[[Handler, Seen], bool]:
    def on(handler: Handler, seen: Seen) -> bool:
        if seen.path == "/files/layer":
            handler.answer(200, data)
        return seen.path == "/files/layer"

    return on


async def test_a_layer_comes_from_its_url_without_a_word_of_who_asks(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    mirror.on = gives(FOREIGN)
    name = served(faulty, "ftp://x/y", f"http://{mirror.host}/none", f"http://{mirror.host}/files/layer")
    auth = await login_wanted(faulty)
    image = await leaf.pull(name, auth=auth)
    assert len(image.layers) == 2
    assert [seen.path for seen in mirror.seen] == ["/none", "/files/layer"]
    assert not any(secret in str(seen.headers) for seen in mirror.seen for secret in (*SECRETS, "authorization"))
    # It goes with an archive, which is for whoever has the image.
    archive = b"".join([part.data async for part in leaf.images.Export(pb.ExportRequest(names=[name]))])
    async with images_leaf(tmp_path / "other") as other:
        assert [each.id for each in await other.load(archive)] == [image.id]


async def test_what_is_something_else_there_is_refused(leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty) -> None:
    mirror.on = gives(FOREIGN[:-1] + b"!")
    await fails(leaf, served(faulty, f"http://{mirror.host}/files/layer"), InvalidArgument, "nothing was stored")


async def test_a_layer_that_is_nowhere_is_told_by_the_registry(leaf: ImagesLeaf, faulty: Faulty) -> None:
    await fails(leaf, served(faulty, "http://127.0.0.1:1/x"), NotFound, f"has no blob {digest(FOREIGN)}")
