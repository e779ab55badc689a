"""Images in a registry, signed or not, and a leaf with a policy."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from corral.images.policy.rules import Kind, Rule
from corral.rpc.errors import PermissionDenied
from support import cosign
from support.cosign import Key, Signed, payload
from support.images import Entry, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.registry import Registry, skopeo

OPEN = Rule("*", Kind.ACCEPT)
CLOSED = Rule("*", Kind.REJECT)


@asynccontextmanager
async def guarded(tmp_path: Path, *rules: Rule, name: str = "images") -> AsyncIterator[ImagesLeaf]:
    """A leaf with this policy."""
    async with images_leaf(tmp_path / name, certs=tmp_path / "certs.d", policy=rules) as made:
        yield made


def archive(path: Path, name: str, what: str) -> Path:
    """Of an image with `what` in it."""
    made = [layer([Entry("f", what.encode() * 100)])]
    return write_oci_archive(path, name, made, image_config(made, Cmd=["/f"]))


def put(registry: Registry, tmp_path: Path, name: str, what: str = "x", tag: str = "1") -> str:
    """An image in the registry, brought there by skopeo; returns its digest."""
    source = archive(tmp_path / f"{name.replace('/', '-')}-{tag}.tar", "x:1", what)
    destination = f"docker://{registry.host}/{name}:{tag}"
    skopeo("--insecure-policy", "copy", "--dest-tls-verify=false", f"oci-archive:{source}", destination)
    return registry.digest(name, tag)


def sign(registry: Registry, name: str, image: str, *by: Key, reference: str = "") -> None:
    """Sign it with each of the keys, for the repository or for another `reference`."""
    what = payload(reference or f"{registry.host}/{name}", image)
    cosign.attach(registry, name, image, [Signed.by(key, what) for key in by])


async def refused(leaf: ImagesLeaf, name: str, why: str, **request: object) -> PermissionDenied:
    """A pull is; one sentence names the image and says why; nothing of it is to be seen."""
    with pytest.raises(PermissionDenied, match=why) as caught:
        await leaf.pull(name, **request)
    assert caught.value.reason == "IMAGE_REFUSED"
    assert f"image {name}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert await leaf.names() == []
    await leaf.settled()
    assert not [path for path in leaf.disk() if path.startswith(("overlay/", "ingest/", "partial/"))]
    return caught.value
