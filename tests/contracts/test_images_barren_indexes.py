"""Indexes that name one another over and over, and have nothing for the platform, are looked through once each."""

import json
import time

import pytest
from support.faulty import OCI_MANIFEST, Faulty, described, manifest_of
from support.images import image_config
from support.images_leaf import ImagesLeaf
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1.types_pb2 import Platform
from corral.images.digest import Digest, digest_of
from corral.images.model import OCI_INDEX, Descriptor
from corral.images.model import Platform as Wanted
from corral.images.registry.walk import Walk
from corral.rpc.errors import NotFound

TOO_LONG_S = 3.0


def nested(bottom: dict[str, object], times: int) -> list[bytes]:
    """Four indexes, the outermost last; each names the one before it so many times, the first names `bottom` once."""
    found, child, count = list[bytes](), bottom, 1
    for _ in range(4):
        found.append(json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [child] * count}).encode())
        child, count = described(OCI_INDEX, found[-1]), times
    return found


async def test_a_walk_ends_soon() -> None:
    windows = described(OCI_MANIFEST, b"{}", platform={"os": "windows", "architecture": "amd64"})
    documents = {digest_of(data): data for data in nested(windows, 200)}
    target, data = list(documents.items())[-1]

    async def source(descriptor: Descriptor) -> bytes:
        return documents[descriptor.digest]

    walk = Walk(source, "image x", Wanted("linux", "amd64"), everything=False)
    began = time.process_time()
    with pytest.raises(NotFound, match="nothing for linux/amd64"):
        await walk.run(Descriptor(OCI_INDEX, Digest(target), len(data)))
    assert time.process_time() - began < TOO_LONG_S


@needs("root", "overlayfs")
async def test_an_export_is_refused_soon(leaf: ImagesLeaf, faulty: Faulty) -> None:
    manifest = manifest_of(faulty, [], image_config([]))
    faulty.add("bottom", OCI_MANIFEST, manifest)
    windows = described(OCI_MANIFEST, manifest, platform={"os": "windows", "architecture": "amd64"})
    for data in nested(windows, 40):
        faulty.add("1", OCI_INDEX, data)
    wanted = Platform(os="windows", architecture="amd64")
    name = f"{faulty.host}/x:1"
    await leaf.pull(name, platform=wanted, all_platforms=True)
    other = Platform(os="linux", architecture="s390x")
    began = time.process_time()
    with pytest.raises(NotFound, match="nothing for linux"):
        await anext(aiter(leaf.images.Export(pb.ExportRequest(names=[name], platform=other))))
    assert time.process_time() - began < TOO_LONG_S
