"""Layers that registries may not pass on come from where their descriptor says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty import OCI_MANIFEST, Faulty, Handler, Seen, manifest_of
from support.faulty_images import SECRETS, fails, login_wanted
from support.images import Entry, digest, image_config, layer
from support.images_leaf import ImagesLeaf, images_leaf
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.images.digest import digest_of
from corral.images.model import Descriptor
from corral.images.reference import parse_reference
from corral.images.registry.credentials import ANONYMOUS
from corral.images.registry.endpoints import Endpoint
from corral.images.registry.host import Host
from corral.images.registry.http import Http
from corral.images.registry.repository import Repository, is_near
from corral.rpc.errors import InvalidArgument, NotFound

pytestmark = needs("root", "overlayfs")

FOREIGN = layer([Entry("theirs", b"x" * 5000)])
KIND = "application/vnd.docker.image.rootfs.foreign.diff.tar"
OURS = layer([Entry("ours", b"y" * 5000)])


def served(faulty: Faulty, *urls: str, kind: str = KIND) -> str:
    """An image whose lower layer the registry has not."""
    layers = [FOREIGN, OURS]
    manifest = json.loads(manifest_of(faulty, layers, image_config(layers)))
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


async def test_a_layer_that_is_for_registries_comes_from_no_url(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty
) -> None:
    mirror.on = gives(FOREIGN)
    name = served(faulty, f"http://{mirror.host}/files/layer", kind="application/vnd.oci.image.layer.v1.tar")
    await fails(leaf, name, NotFound, f"has no blob {digest(FOREIGN)}")
    assert mirror.seen == []


async def test_no_more_than_a_few_urls_are_asked(leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty) -> None:
    mirror.on = gives(FOREIGN)
    urls = [f"http://{mirror.host}/none{number}" for number in range(4)]
    await fails(leaf, served(faulty, *urls, f"http://{mirror.host}/files/layer"), NotFound, "has no blob")
    assert [seen.path for seen in mirror.seen] == ["/none0", "/none1", "/none2", "/none3"]


@pytest.mark.parametrize("near", ["127.0.0.1", "127.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254",
                                  "0.0.0.0", "[fe80::1]", "localhost", "LOCALHOST."])  # fmt: skip
def test_an_address_of_this_host_or_its_link_is_known(near: str) -> None:
    assert is_near(f"http://{near}:8080/x")
    assert not is_near("https://registry.example/x")
    assert not is_near("https://192.0.2.1/x")


@pytest.mark.parametrize(("base", "asked"), [("https://registry.example/v2", 0), ("http://127.0.0.1:1/v2", 1)])
async def test_only_a_registry_of_this_host_leads_to_its_addresses(mirror: Faulty, base: str, asked: int) -> None:
    url = f"http://{mirror.host}/files/layer"
    descriptor = Descriptor(KIND, digest_of(FOREIGN), len(FOREIGN), urls=(url,))
    http = Http()
    try:
        host = Host(http, Endpoint(base), ANONYMOUS)
        stream = await Repository([host], parse_reference("registry.example/x:1")).elsewhere(descriptor, 0, 0)
        assert stream is None
    finally:
        await http.close()
    assert len(mirror.seen) == asked
