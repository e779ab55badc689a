"""Images go to and come from a real registry, with skopeo and podman at its other side."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.images import Entry, digest, directory, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.registry import Authority, Registry, podman, run, running, skopeo, write_hosts
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2 as types
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable

pytestmark = needs("root", "overlayfs", "docker-registry", "skopeo", "openssl")

ARM = types.Platform(os="linux", architecture="arm64")
AMD = types.Platform(os="linux", architecture="amd64")
Step = types.Progress


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Registry]:
    """With TLS and a password."""
    where = tmp_path_factory.mktemp("registry")
    with running(where, authority=authority, credentials=("alice", "pass:word")) as made:
        yield made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """As `docker run registry` gives one."""
    with running(tmp_path_factory.mktemp("plain")) as made:
        yield made


@pytest.fixture
def certs(tmp_path: Path, registry: Registry, authority: Authority) -> Path:
    """hosts.toml for the registry with TLS."""
    write_hosts(tmp_path / "certs.d", registry.host, f'server = "https://{registry.host}"\nca = "{authority.ca}"\n')
    return tmp_path / "certs.d"


@pytest.fixture
async def leaf(tmp_path: Path, certs: Path) -> AsyncIterator[ImagesLeaf]:
    async with images_leaf(tmp_path / "images", certs=certs) as made:
        yield made


@pytest.fixture
async def other(tmp_path: Path, certs: Path) -> AsyncIterator[ImagesLeaf]:
    """Another host."""
    async with images_leaf(tmp_path / "other", certs=certs) as made:
        yield made


ALICE = pb.RegistryAuth(username="alice", password="pass:word")
SKOPEO = ["--insecure-policy"]


def layers(what: str) -> list[bytes]:
    return [
        layer([directory("d"), Entry("d/old", what.encode())]),
        layer([Entry("d/.wh.old"), Entry("new", what.encode() * 1000)]),
    ]


def archive(path: Path, name: str, what: str = "x") -> Path:
    made = layers(what)
    return write_oci_archive(path, name, made, image_config(made, Cmd=["/x"]))


async def files(leaf: ImagesLeaf, image: str, where: Path) -> set[str]:
    made = await leaf.prepare("look", image=image)
    with mounted(made.mounts, where) as root:
        found = {str(path.relative_to(root)) for path in root.rglob("*")}
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="look"))
    return found


async def test_what_corral_pushes_skopeo_reads_under_the_same_digest(
    leaf: ImagesLeaf, registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    [image] = await leaf.load(archive(tmp_path / "x.tar", "x:1"))
    name = f"{registry.host}/team/pushed:1"
    assert await leaf.push("x:1", name, auth=ALICE) == image.target.digest
    assert registry.digest("team/pushed", "1") == image.target.digest
    credentials = ["--creds", "alice:pass:word", "--cert-dir", str(authority.ca.parent)]
    told = json.loads(skopeo(*SKOPEO, "inspect", *credentials, f"docker://{name}"))
    assert told["Digest"] == image.target.digest
    skopeo(*SKOPEO, "copy", "-q", "--src-creds", "alice:pass:word", "--src-cert-dir", authority.ca.parent,
           f"docker://{name}", f"dir:{tmp_path}/copied")  # fmt: skip
    assert digest((tmp_path / "copied" / "manifest.json").read_bytes()) == image.target.digest


@needs("podman")
async def test_what_corral_pushes_podman_pulls_under_the_same_id(
    leaf: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    [image] = await leaf.load(archive(tmp_path / "x.tar", "x:1", "podman"))
    name = f"{plain.host}/for/podman:1"
    await leaf.push("x:1", name)
    with podman(tmp_path / "podman") as command:
        policy = ["--tls-verify=false", "--signature-policy", tmp_path / "podman/policy.json"]
        pulled = run([*command, "pull", "-q", *policy, name]).stdout.strip()
        assert pulled == image.id.removeprefix("sha256:")
        shown = run([*command, "image", "inspect", "--format", "{{.Digest}}", name]).stdout.strip()
        assert shown == image.target.digest


@pytest.mark.parametrize("form", ["oci", "v2s2"])
async def test_what_skopeo_pushes_corral_pulls_and_unpacks(
    leaf: ImagesLeaf, registry: Registry, authority: Authority, tmp_path: Path, form: str
) -> None:
    source = archive(tmp_path / "s.tar", "s:1", form)
    name = f"{registry.host}/by/skopeo-{form}:1"
    skopeo(*SKOPEO, "copy", "-q", "--format", form, "--dest-creds", "alice:pass:word", "--dest-cert-dir",
           authority.ca.parent, f"oci-archive:{source}", f"docker://{name}")  # fmt: skip
    said = await leaf.pull_all(name, auth=ALICE)
    image = said[-1].image
    assert image.name == name
    assert image.target.digest == registry.digest(f"by/skopeo-{form}", "1")
    assert [entry.diff_id for entry in image.layers] == [digest(data) for data in layers(form)]
    assert image.chain_id
    assert await files(leaf, name, tmp_path / "m") == {"d", "new"}
    told = {part.progress.item: part.progress for part in said if part.HasField("progress")}
    for entry in image.layers:
        assert told[entry.blob.digest].total_bytes == entry.blob.size_bytes
        assert told[entry.blob.digest].step == Step.STEP_DONE
    await leaf.settled()
    assert leaf.disk() == {path for path in leaf.disk() if path.startswith(("blobs/", "overlay/l/"))}


async def test_a_pull_by_digest_takes_that_and_is_found_by_it(
    leaf: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    [one] = await leaf.load(archive(tmp_path / "1.tar", "one:1", "one"))
    [two] = await leaf.load(archive(tmp_path / "2.tar", "two:1", "two"))
    for image in (one, two):
        await leaf.push(image.name, f"{plain.host}/moved:1")
    name = f"{plain.host}/moved:1@{one.target.digest}"
    image = await leaf.pull(name)
    assert image.id == one.id
    assert image.name == f"{plain.host}/moved@{one.target.digest}"
    assert (await leaf.images.Get(pb.GetImageRequest(name=name))).id == one.id
    with pytest.raises(NotFound, match="has no image"):
        await leaf.pull(f"{plain.host}/moved@{digest(b'nothing')}")


async def test_a_tag_that_moved_is_pulled_anew_and_one_that_did_not_costs_one_request(
    leaf: ImagesLeaf, other: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    name = f"{plain.host}/tags:1"
    [one] = await other.load(archive(tmp_path / "1.tar", "one:1", "one"))
    [two] = await other.load(archive(tmp_path / "2.tar", "two:1", "two"))
    await other.push("one:1", name)
    assert (await leaf.pull(name)).id == one.id
    before = plain.log().count("/v2/tags/")
    assert (await leaf.pull(name)).id == one.id
    assert plain.log().count("/v2/tags/") - before <= 2, plain.log()[-2000:]
    await other.push("two:1", name)
    assert (await leaf.pull(name)).id == two.id
    assert sorted(await leaf.names()) == ["", name]


async def index(leaf: ImagesLeaf, registry: Registry, tmp_path: Path, name: str) -> str:
    """An index for two platforms in the registry; its digest."""
    entries = []
    for architecture in ("amd64", "arm64"):
        made = layers(architecture)
        config = image_config(made).replace(b'"architecture":"amd64"', f'"architecture":"{architecture}"'.encode())
        [image] = await leaf.load(
            write_oci_archive(tmp_path / f"{architecture}.tar", f"{architecture}:1", made, config)
        )
        await leaf.push(f"{architecture}:1", f"{registry.host}/{name}:{architecture}")
        target = {"mediaType": image.target.media_type, "digest": image.target.digest, "size": image.target.size_bytes}
        entries.append({**target, "platform": {"os": "linux", "architecture": architecture}})
    media_type = "application/vnd.oci.image.index.v1+json"
    document = json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).encode()
    registry.request("PUT", f"{name}/manifests/1", {"Content-Type": media_type}, document)
    return digest(document)


async def test_from_an_index_the_platform_is_taken_that_was_asked_for(
    leaf: ImagesLeaf, other: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    whole = await index(other, plain, tmp_path, "two-platforms")
    name = f"{plain.host}/two-platforms:1"
    image = await leaf.pull(name, platform=AMD)
    assert (image.target.digest, image.platform.architecture) == (whole, "amd64")
    blobs = [blob async for blob in leaf.content.List(pb.ListBlobsRequest())]
    assert len(blobs) == 5  # index, manifest, config, two layers
    image = await leaf.pull(name, platform=ARM)
    assert (image.target.digest, image.platform.architecture) == (whole, "arm64")
    with pytest.raises(NotFound, match="offers linux/amd64, linux/arm64"):
        await leaf.pull(name, platform=types.Platform(os="linux", architecture="s390x"))
    with pytest.raises(NotFound, match="linux/arm64"):
        await leaf.pull(f"{plain.host}/two-platforms:amd64", platform=ARM)


async def test_all_platforms_come_and_go_as_one_index(
    leaf: ImagesLeaf, other: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    whole = await index(other, plain, tmp_path, "all")
    image = await leaf.pull(f"{plain.host}/all:1", all_platforms=True)
    assert image.target.digest == whole
    blobs = [blob async for blob in leaf.content.List(pb.ListBlobsRequest())]
    assert len(blobs) == 1 + 2 * 4
    assert await leaf.push(image.name, f"{plain.host}/copy:1") == whole
    assert plain.digest("copy", "1") == whole
    raw = json.loads(skopeo(*SKOPEO, "inspect", "--tls-verify=false", "--raw", f"docker://{plain.host}/copy:1"))
    for entry in raw["manifests"]:
        assert plain.digest("copy", entry["digest"]) == entry["digest"]
    await leaf.images.Remove(pb.RemoveImageRequest(name=image.name, force=True))
    await leaf.settled()
    assert leaf.disk() == set()


async def test_of_an_index_that_is_here_in_part_that_part_is_pushed(
    leaf: ImagesLeaf, other: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    await index(other, plain, tmp_path, "part")
    image = await leaf.pull(f"{plain.host}/part:1", platform=AMD)
    assert await leaf.push(image.name, f"{plain.host}/part-copy:1") == image.manifest.digest
    assert await leaf.push(image.name, f"{plain.host}/part-copy:2", platform=AMD) == image.manifest.digest
    with pytest.raises(FailedPrecondition, match="--all-platforms"):
        await leaf.push(image.name, f"{plain.host}/part-copy:3", all_platforms=True)
    with pytest.raises(FailedPrecondition, match="not here"):
        await leaf.push(image.name, f"{plain.host}/part-copy:3", platform=ARM)
    assert sorted(plain.tags("part-copy")) == ["1", "2"]


async def test_blobs_that_the_registry_has_under_another_name_are_mounted(
    leaf: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    await leaf.load(archive(tmp_path / "x.tar", "x:1", "mounted"))
    said = await leaf.push_all("x:1", f"{plain.host}/first:1")
    assert Step.STEP_TRANSFER in {part.progress.step for part in said}
    said = await leaf.push_all("x:1", f"{plain.host}/second:1")
    assert Step.STEP_TRANSFER not in {part.progress.step for part in said}
    assert "from=first" in plain.log()
    assert plain.digest("second", "1") == plain.digest("first", "1")


async def test_a_pulled_image_is_mounted_from_where_it_came(
    leaf: ImagesLeaf, other: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    await other.load(archive(tmp_path / "x.tar", "x:1", "origin"))
    await other.push("x:1", f"{plain.host}/origin/a:1")
    image = await leaf.pull(f"{plain.host}/origin/a:1")
    said = await leaf.push_all(image.name, f"{plain.host}/origin/b:1")
    assert {part.progress.step for part in said if part.HasField("progress")} <= {Step.STEP_EXISTS, Step.STEP_WAITING}
    assert said[-1].pushed.digest == image.target.digest


async def test_a_large_blob_is_sent_in_chunks_and_fetched_in_parts(
    leaf: ImagesLeaf, other: ImagesLeaf, plain: Registry, tmp_path: Path
) -> None:
    import random

    made = [layer([Entry("big", random.Random(1).randbytes(70 << 20))])]
    [image] = await leaf.load(write_oci_archive(tmp_path / "x.tar", "big:1", made, image_config(made), compress=False))
    await leaf.push("big:1", f"{plain.host}/big:1")
    assert plain.log().count("PATCH /v2/big/") >= 5, "chunks of 16 MiB"
    pulled = await other.pull(f"{plain.host}/big:1")
    assert pulled.target.digest == image.target.digest
    gets = [line for line in plain.log().splitlines() if "GET /v2/big/blobs" in line and " 206 " in line]
    assert len(gets) >= 5, "parts of 16 MiB"
    assert await files(other, pulled.name, tmp_path / "m") == {"big"}


async def test_what_is_not_in_the_registry_is_not_found(leaf: ImagesLeaf, plain: Registry) -> None:
    with pytest.raises(NotFound, match=f"registry {plain.host} has no image {plain.host}/none:1"):
        await leaf.pull(f"{plain.host}/none:1")
    assert leaf.disk() == set()


async def test_a_registry_that_is_not_there_cannot_be_reached(leaf: ImagesLeaf) -> None:
    with pytest.raises(Unavailable, match="Connection refused") as caught:
        await leaf.pull("127.0.0.1:1/x:1")
    assert caught.value.reason == "REGISTRY_UNREACHABLE"
    with pytest.raises(Unavailable, match="cannot be resolved"):
        await leaf.pull("registry.invalid/x:1")


async def test_an_untrusted_certificate_is_refused_unless_that_is_asked_for(tmp_path: Path, registry: Registry) -> None:
    """By a name that is not loopback, for which corral takes any certificate."""
    write_hosts(tmp_path / "certs.d", "r.example", f'server = "https://{registry.host}"\n')
    async with images_leaf(tmp_path / "images", certs=tmp_path / "certs.d") as leaf:
        with pytest.raises(Unavailable, match="certificate is not trusted") as caught:
            await leaf.pull("r.example/x:1", auth=ALICE)
        assert caught.value.reason == "REGISTRY_UNTRUSTED"
        with pytest.raises(NotFound):
            await leaf.pull("r.example/x:1", auth=ALICE, insecure=True)


async def test_an_image_without_a_name_of_its_own_needs_a_destination(leaf: ImagesLeaf, tmp_path: Path) -> None:
    [image] = await leaf.load(archive(tmp_path / "x.tar", "x:1"))
    with pytest.raises(InvalidArgument, match="say where"):
        await leaf.push(image.id)
    with pytest.raises(InvalidArgument, match="say where"):
        await leaf.push(image.id.removeprefix("sha256:")[:12])
    with pytest.raises(InvalidArgument, match="digest"):
        await leaf.push("x:1", f"r.example/x@{image.target.digest}")
    with pytest.raises(NotFound):
        await leaf.push("none:1")


async def test_an_event_tells_of_a_pull(leaf: ImagesLeaf, other: ImagesLeaf, plain: Registry, tmp_path: Path) -> None:
    await other.load(archive(tmp_path / "x.tar", "x:1"))
    await other.push("x:1", f"{plain.host}/told:1")
    image = await leaf.pull(f"{plain.host}/told:1")
    request = types.EventsRequest(no_follow=True)
    events = [event async for answer in leaf.images.Events(request) for event in answer.events]
    assert [event.topic for event in events] == ["image.unpacked", "image.pulled"]
    assert events[1].payload["name" if "name" in events[1].payload else "id"] == image.id
