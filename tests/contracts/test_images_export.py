"""Images become archives, over gRPC, and other programs take those."""

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.images import Entry, digest, directory, image_config, layer, symlink, write_docker_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.registry import podman, run
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2 as types
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound

pytestmark = needs("root", "overlayfs")

Header = pb.ImportHeader
DOCKER, OCI = Header.FORMAT_DOCKER_ARCHIVE, Header.FORMAT_OCI_ARCHIVE
ARM = types.Platform(os="linux", architecture="arm64")
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[ImagesLeaf]:
    """Another host."""
    async with images_leaf(tmp_path / "other") as made:
        yield made


def some_layers(word: bytes = b"1") -> list[bytes]:
    return [layer([directory("d"), Entry("d/f", word), symlink("s", "d/f")]), layer([Entry("d/g", b"2" * 3000)])]


async def exported(leaf: ImagesLeaf, *names: str, form: Header.Format = OCI, **request: object) -> bytes:
    wanted = pb.ExportRequest(names=names, format=form, **request)  # type: ignore[arg-type]
    return b"".join([part.data async for part in leaf.images.Export(wanted)])


def files(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def described(data: bytes, media_type: str, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


def index_archive(platforms: dict[str, list[bytes]], *, leave_out: str = "") -> tuple[bytes, str]:
    """An OCI archive of one index called multi:1, and the digest of that."""
    blobs, entries = {}, []
    for architecture, layers in platforms.items():
        config = json.dumps(json.loads(image_config(layers)) | {"architecture": architecture}).encode()
        parts = [described(data, "application/vnd.oci.image.layer.v1.tar") for data in layers]
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": described(config, "application/vnd.oci.image.config.v1+json"),
                "layers": parts,
            }
        ).encode()
        entries.append(described(manifest, MANIFEST_TYPE, platform={"os": "linux", "architecture": architecture}))
        if architecture != leave_out:
            blobs |= {digest(data): data for data in (manifest, config, *layers)}
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}).encode()
    blobs[digest(index)] = index
    names = {"io.containerd.image.name": "docker.io/library/multi:1"}
    top = json.dumps({"schemaVersion": 2, "manifests": [described(index, INDEX_TYPE, annotations=names)]}).encode()
    members = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": top}
    members |= {f"blobs/sha256/{name[7:]}": data for name, data in blobs.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue(), digest(index)


def two_platforms() -> dict[str, list[bytes]]:
    return {"amd64": some_layers(b"amd"), "arm64": some_layers(b"arm")}


async def load_one(leaf: ImagesLeaf, tmp_path: Path, name: str = "one:1", word: bytes = b"1") -> pb.Image:
    layers = some_layers(word)
    [image] = await leaf.load(write_docker_archive(tmp_path / "x.tar", name, layers, image_config(layers)))
    return image


@pytest.mark.parametrize("form", [DOCKER, OCI], ids=["docker", "oci"])
async def test_what_is_exported_is_imported_again_as_it_was(
    leaf: ImagesLeaf, other: ImagesLeaf, tmp_path: Path, form: Header.Format
) -> None:
    before = await load_one(leaf, tmp_path)
    [after] = await other.load(await exported(leaf, "one:1", form=form))
    assert (after.name, after.id, after.target.digest) == (before.name, before.id, before.target.digest)
    assert list(after.layers) == list(before.layers)
    assert after.history == before.history


async def test_an_oci_archive_holds_blobs_by_digest_and_an_index_with_both_names(
    leaf: ImagesLeaf, tmp_path: Path
) -> None:
    image = await load_one(leaf, tmp_path)
    found = files(await exported(leaf, "one:1"))
    assert json.loads(found.pop("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    [entry] = json.loads(found.pop("index.json"))["manifests"]
    assert entry["digest"] == image.target.digest
    assert entry["annotations"] == {
        "io.containerd.image.name": "docker.io/library/one:1",
        "org.opencontainers.image.ref.name": "1",
    }
    assert len(found) == 4
    assert all(name == f"blobs/sha256/{hashlib.sha256(data).hexdigest()}" for name, data in found.items())


async def test_a_docker_archive_has_its_table_beside(leaf: ImagesLeaf, tmp_path: Path) -> None:
    image = await load_one(leaf, tmp_path)
    found = files(await exported(leaf, "one:1", form=DOCKER))
    [entry] = json.loads(found["manifest.json"])
    assert entry["RepoTags"] == ["one:1"]
    assert digest(found[entry["Config"]]) == image.id
    assert [digest(found[name]) for name in entry["Layers"]] == [part.blob.digest for part in image.layers]


async def test_the_same_images_make_the_same_archive_on_any_host(
    leaf: ImagesLeaf, other: ImagesLeaf, tmp_path: Path
) -> None:
    for host, order in ((leaf, ("one:1", "two:1")), (other, ("two:1", "one:1"))):
        for name in order:
            await load_one(host, tmp_path, name, name.encode())
    first = await exported(leaf, "one:1", "two:1", form=DOCKER)
    assert first == await exported(other, "two:1", "one:1", "two:1", form=DOCKER)
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} == {(0, 0, 0, 0o644)}


async def test_several_names_of_several_images_go_in_one_archive(
    leaf: ImagesLeaf, other: ImagesLeaf, tmp_path: Path
) -> None:
    await load_one(leaf, tmp_path, "one:1")
    await load_one(leaf, tmp_path, "two:1", b"two")
    await leaf.images.Tag(pb.TagImageRequest(source="one:1", target="registry.example:5000/a/b:c"))
    for form in (DOCKER, OCI):
        await other.load(await exported(leaf, "one:1", "two:1", "registry.example:5000/a/b:c", form=form))
        assert await other.names() == ["one:1", "two:1", "registry.example:5000/a/b:c"]


async def test_an_image_that_is_asked_for_by_its_id_has_no_name_in_the_archive(
    leaf: ImagesLeaf, other: ImagesLeaf, tmp_path: Path
) -> None:
    image = await load_one(leaf, tmp_path)
    found = files(await exported(leaf, image.id[7:19], form=DOCKER))
    assert json.loads(found["manifest.json"])[0]["RepoTags"] == []
    [again] = await other.load(await exported(leaf, image.id))
    assert (again.id, again.name) == (image.id, "")


async def test_an_index_keeps_its_digest_and_all_that_is_here_of_it(leaf: ImagesLeaf, other: ImagesLeaf) -> None:
    archive, index = index_archive(two_platforms())
    [image] = await leaf.load(archive)
    assert image.target.digest == index
    again = await exported(leaf, "multi:1")
    assert files(again).keys() == files(archive).keys()
    [same] = await other.load(again)
    assert same.target.digest == index
    [arm] = await other.load(again, platform=ARM, name="arm:1")
    assert arm.platform.architecture == "arm64"


async def test_of_an_index_a_part_is_enough_if_it_is_what_this_host_runs(leaf: ImagesLeaf, other: ImagesLeaf) -> None:
    archive, index = index_archive(two_platforms(), leave_out="arm64")
    await leaf.load(archive)
    [again] = await other.load(await exported(leaf, "multi:1", form=DOCKER))
    assert again.target.digest == index
    with pytest.raises(FailedPrecondition, match="not here"):
        await exported(leaf, "multi:1", platform=ARM)


async def test_a_platform_chooses_one_manifest_of_an_index(leaf: ImagesLeaf) -> None:
    platforms = two_platforms()
    await leaf.load(index_archive(platforms)[0])
    found = files(await exported(leaf, "multi:1", form=DOCKER, platform=ARM))
    [entry] = json.loads(found["manifest.json"])
    assert json.loads(found[entry["Config"]])["architecture"] == "arm64"
    assert [found[name] for name in entry["Layers"]] == platforms["arm64"]
    assert len(found) == 3 + 1 + 1 + 2
    with pytest.raises(NotFound, match="nothing for linux/s390x"):
        await exported(leaf, "multi:1", platform=types.Platform(os="linux", architecture="s390x"))


async def test_what_cannot_be_exported_says_why(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await load_one(leaf, tmp_path)
    with pytest.raises(NotFound, match="no image 'absent'"):
        await exported(leaf, "one:1", "absent")
    with pytest.raises(InvalidArgument, match="1 to"):
        await exported(leaf)
    with pytest.raises(InvalidArgument, match="not as a root file system"):
        await exported(leaf, "one:1", form=Header.FORMAT_ROOTFS)


async def test_a_blob_that_was_changed_on_disk_ends_the_archive(leaf: ImagesLeaf, tmp_path: Path) -> None:
    image = await load_one(leaf, tmp_path)
    path = leaf.root / "blobs/sha256" / image.layers[1].blob.digest[7:]
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(InvalidArgument, match="changed on disk"):
        await exported(leaf, "one:1")


async def test_a_reader_that_stops_reading_holds_the_writer_back_and_the_image_here(
    leaf: ImagesLeaf, tmp_path: Path
) -> None:
    """The image is removed while its archive is half out; the rest still comes."""
    layers = [layer([Entry("big", bytes(range(256)) * 200_000)])]
    await leaf.load(write_docker_archive(tmp_path / "b.tar", "big:1", layers, image_config(layers)))
    call = leaf.images.Export(pb.ExportRequest(names=["big:1"]))
    got = [(await call.read()).data]
    await leaf.images.Remove(pb.RemoveImageRequest(name="big:1"))
    got += [part.data async for part in call]
    found = files(b"".join(got))
    assert layers[0] in found.values()


async def test_an_export_that_is_cancelled_leaves_the_image_free(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = [layer([Entry("big", bytes(range(256)) * 200_000)])]
    await leaf.load(write_docker_archive(tmp_path / "b.tar", "big:1", layers, image_config(layers)))
    call = leaf.images.Export(pb.ExportRequest(names=["big:1"]))
    await call.read()
    call.cancel()
    await leaf.images.Remove(pb.RemoveImageRequest(name="big:1"))
    for _ in range(100):
        await leaf.images.Prune(pb.PruneRequest())
        if not any(path.startswith("blobs/") for path in leaf.disk()):
            return
    raise AssertionError(leaf.disk())


# Other programs


@pytest.fixture
async def archives(leaf: ImagesLeaf, tmp_path: Path) -> dict[str, Path]:
    """One image with one name, saved in both forms."""
    await load_one(leaf, tmp_path)
    found = {"docker": tmp_path / "d.tar", "oci": tmp_path / "o.tar"}
    found["docker"].write_bytes(await exported(leaf, "one:1", form=DOCKER))
    found["oci"].write_bytes(await exported(leaf, "one:1"))
    return found


@needs("skopeo")
async def test_skopeo_finds_the_same_digests(leaf: ImagesLeaf, archives: dict[str, Path], tmp_path: Path) -> None:
    image = await leaf.images.Get(pb.GetImageRequest(name="one:1"))
    for source in (f"oci-archive:{archives['oci']}:1", f"oci-archive:{archives['docker']}:1"):
        raw = run(["skopeo", "inspect", "--raw", source]).stdout.encode()
        assert digest(raw) == image.target.digest
    source = f"docker-archive:{archives['docker']}:one:1"
    config = run(["skopeo", "inspect", "--config", "--raw", source]).stdout.encode()
    assert digest(config) == image.id
    run(["skopeo", "copy", "--insecure-policy", "-q", source, f"oci:{tmp_path}/copy:1"])
    assert digest(run(["skopeo", "inspect", "--config", "--raw", f"oci:{tmp_path}/copy:1"]).stdout.encode()) == image.id


@needs("podman")
async def test_podman_loads_both_forms(leaf: ImagesLeaf, archives: dict[str, Path], tmp_path: Path) -> None:
    image = await leaf.images.Get(pb.GetImageRequest(name="one:1"))
    for form, archive in archives.items():
        with podman(tmp_path / form) as command:
            run([*command, "load", "-q", "-i", archive])
            shown = json.loads(run([*command, "image", "inspect", "docker.io/library/one:1"]).stdout)
            assert f"sha256:{shown[0]['Id']}" == image.id


@contextmanager
def containerd(root: Path) -> Iterator[list[str]]:
    """containerd with a directory of its own, and the words that ctr is called with."""
    root.mkdir()
    config = root / "config.toml"
    config.write_text(f'version = 2\nroot = "{root}/root"\nstate = "{root}/state"\n[grpc]\naddress = "{root}/s"\n')
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(["containerd", "-c", config], stdout=log, stderr=log)
    ctr = ["ctr", "-a", f"{root}/s", "-n", "corral-test"]
    try:
        for _ in range(100):
            if subprocess.run([*ctr, "version"], capture_output=True, check=False, timeout=30).returncode == 0:
                break
        yield ctr
    finally:
        process.terminate()
        process.wait()


@needs("ctr")
async def test_containerd_imports_both_forms(leaf: ImagesLeaf, archives: dict[str, Path], tmp_path: Path) -> None:
    image = await leaf.images.Get(pb.GetImageRequest(name="one:1"))
    with containerd(tmp_path / "containerd") as ctr:
        for archive in archives.values():
            run([*ctr, "image", "import", "--no-unpack", archive])
            assert f"docker.io/library/one:1 {image.target.media_type} {image.target.digest}" in " ".join(
                run([*ctr, "image", "ls"]).stdout.split()
            )
            run([*ctr, "image", "rm", "docker.io/library/one:1"])
