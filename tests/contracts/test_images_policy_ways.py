"""A policy holds for whatever way an image comes, under whatever name, and for what is here already."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.cosign import Key
from support.images_leaf import ImagesLeaf, import_requests
from support.policies import CLOSED, OPEN, archive, guarded, put, sign
from support.registry import Registry, running
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1.types_pb2 import Progress as Step
from corral.images.policy.rules import Rule
from corral.rpc.errors import CorralError, InvalidArgument, NotFound, PermissionDenied

pytestmark = needs("root", "overlayfs", "docker-registry", "skopeo", "openssl")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as made:
        yield made


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Key]:
    where = tmp_path_factory.mktemp("keys")
    names = {"ours": "ecdsa", "theirs": "ecdsa", "rsa": "rsa", "ed25519": "ed25519", "p384": "ecdsa-p384"}
    return {name: Key.make(where, name, algorithm) for name, algorithm in names.items()}


@pytest.fixture(scope="module")
def ours(keys: dict[str, Key]) -> Key:
    return keys["ours"]


@pytest.fixture
async def leaf(tmp_path: Path, registry: Registry, ours: Key) -> AsyncIterator[ImagesLeaf]:
    """Our key is wanted of the registry; the rest of the world is open."""
    async with guarded(tmp_path, OPEN, Rule(registry.host, keys=(ours.public,))) as made:
        yield made


async def test_an_archive_cannot_bring_what_was_not_verified(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key
) -> None:
    name = f"{registry.host}/brought:1"
    brought = archive(tmp_path / "brought.tar", name, "brought")
    for header in ({}, {"name": name}, {"name": name, "no_unpack": True}):
        with pytest.raises(PermissionDenied, match=f"image {name} .*no signature of it was verified here.*corral pull"):
            await leaf.load(brought, **header)
    assert await leaf.names() == []
    await leaf.settled()
    assert not leaf.disk()
    assert Step.STEP_UNPACK not in {part.progress.step for part in await everything_said(leaf, brought)}
    image = put(registry, tmp_path, "brought", "brought")
    sign(registry, "brought", image, ours)
    await leaf.pull(name)
    await leaf.load(brought, name=name)


async def test_another_name_or_none_is_no_way_around(tmp_path: Path, registry: Registry, ours: Key) -> None:
    async with guarded(tmp_path, name="images") as leaf:
        await leaf.load(archive(tmp_path / "x.tar", "x:1", "around"))
        [known] = (await leaf.images.List(pb.ListImagesRequest())).images
    async with guarded(tmp_path, CLOSED, Rule(registry.host, keys=(ours.public,))) as leaf:
        for target in (f"{registry.host}/around:1", "y:1"):
            with pytest.raises(PermissionDenied, match=f"image {target}"):
                await leaf.images.Tag(pb.TagImageRequest(source="x:1", target=target))
        for name in ("x:1", known.id, known.id[7:20]):
            with pytest.raises(PermissionDenied, match=r"image x:1 .*the policy for \*: it takes none"):
                await leaf.prepare("c", image=name)
        with pytest.raises(PermissionDenied, match="it takes none"):
            await leaf.prepare("c", parent=known.chain_id)
        with pytest.raises(PermissionDenied, match="it takes none"):
            await leaf.view("c", image="x:1")
        with pytest.raises(NotFound):
            await leaf.snapshots.Get(pb.SnapshotRequest(key="c"))


async def test_an_image_from_before_the_policy_is_used_once_a_pull_has_verified_it(
    tmp_path: Path, registry: Registry, ours: Key
) -> None:
    image, name = put(registry, tmp_path, "before"), f"{registry.host}/before:1"
    async with guarded(tmp_path) as leaf:
        await leaf.pull(name)
        await leaf.prepare("old", image=name)
    async with guarded(tmp_path, CLOSED, Rule(registry.host, keys=(ours.public,))) as leaf:
        assert (await leaf.prepare("old", image=name)).mounts, "a container that exists stays as it is"
        with pytest.raises(PermissionDenied, match=f"image {name} .*`corral pull {name}` does that"):
            await leaf.prepare("new", image=name)
        with pytest.raises(PermissionDenied, match="it has no signature"):
            await leaf.pull(name)
        sign(registry, "before", image, ours)
        await leaf.pull(name)
        await leaf.prepare("new", image=name)


async def test_a_key_that_is_taken_out_of_the_policy_takes_its_images_with_it(
    tmp_path: Path, registry: Registry, keys: dict[str, Key]
) -> None:
    image, name = put(registry, tmp_path, "revoked"), f"{registry.host}/revoked:1"
    sign(registry, "revoked", image, keys["ours"])
    async with guarded(tmp_path, CLOSED, Rule(registry.host, keys=(keys["ours"].public,))) as leaf:
        await leaf.pull(name)
    async with guarded(tmp_path, CLOSED, Rule(registry.host, keys=(keys["rsa"].public,))) as leaf:
        with pytest.raises(PermissionDenied, match="no signature of it was verified"):
            await leaf.prepare("c", image=name)
        with pytest.raises(PermissionDenied, match="not by a key of the policy"):
            await leaf.pull(name)


async def test_what_was_verified_needs_no_registry_later(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key
) -> None:
    image, name = put(registry, tmp_path, "later"), f"{registry.host}/later:1"
    sign(registry, "later", image, ours)
    await leaf.pull(name)
    asked = registry.log().count("later")
    await leaf.prepare("c", image=name)
    await leaf.images.Tag(pb.TagImageRequest(source=name, target=f"{registry.host}/later:2"))
    await leaf.prepare("d", image=f"{registry.host}/later:2")
    assert registry.log().count("later") == asked


async def test_a_commit_is_an_image_like_any_other(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key
) -> None:
    image, name = put(registry, tmp_path, "base"), f"{registry.host}/base:1"
    sign(registry, "base", image, ours)
    await leaf.pull(name)
    await leaf.prepare("c", image=name)
    await leaf.images.Commit(pb.CommitImageRequest(key="c", name="mine:1"))
    with pytest.raises(PermissionDenied, match=f"image {registry.host}/base:2"):
        await leaf.images.Commit(pb.CommitImageRequest(key="c", name=f"{registry.host}/base:2"))
    assert sorted(await leaf.names()) == [f"{registry.host}/base:1", "mine:1"]


async def everything_said(leaf: ImagesLeaf, archive: Path) -> list[pb.ImportResponse]:
    """By an import, until it is refused."""
    said: list[pb.ImportResponse] = []

    async def listen() -> None:
        async for part in leaf.images.Import(import_requests(archive)):
            said.append(part)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(PermissionDenied):
        await listen()
    return said


# Settings


@pytest.mark.parametrize("text", ["", "nothing", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
async def test_a_key_that_is_none_keeps_the_daemon_from_starting(tmp_path: Path, text: str) -> None:
    (tmp_path / "key.pub").write_text(text)
    with pytest.raises(InvalidArgument, match=r"key\.pub is no public key in PEM form"):
        async with guarded(tmp_path, OPEN, Rule("a.example", keys=(tmp_path / "key.pub",))):
            pass


async def test_keys_that_nobody_should_use_keep_the_daemon_from_starting(tmp_path: Path, ours: Key) -> None:
    short, other = Key.make(tmp_path, "short", "rsa-short"), Key.make(tmp_path, "x", "x25519")
    both = tmp_path / "both.pub"
    both.write_text(ours.public.read_text() * 2)
    for path, why in (
        (short.public, "1024 bits"),
        (other.public, "nobody signs images with"),
        (both, "more than one"),
        (tmp_path / "none", "cannot read .*No such file"),
    ):
        with pytest.raises(CorralError, match=why):
            async with guarded(tmp_path, OPEN, Rule("a.example", keys=(path,))):
                pass
