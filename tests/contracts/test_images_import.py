"""Archives become images, over gRPC."""

import asyncio
import bz2
import gc
import gzip
import io
import json
import lzma
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zstandard
from support.images import (
    Entry,
    digest,
    directory,
    image_config,
    layer,
    symlink,
    write_busybox,
    write_docker_archive,
    write_oci_archive,
)
from support.images_leaf import ImagesLeaf, images_leaf, import_requests
from support.overlay import mounted
from support.requirements import needs
from support.tars import packed

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2 as types
from corral.rpc.errors import AlreadyExists, InvalidArgument, NotFound

PACKERS = (bytes, gzip.compress, zstandard.compress, bz2.compress, lzma.compress)

pytestmark = needs("root", "overlayfs")

Header = pb.ImportHeader


def two_layers() -> list[bytes]:
    return [
        layer([directory("d"), Entry("d/old", b"1"), Entry("kept", b"2")]),
        layer([Entry("d/.wh.old"), Entry("d/new", b"3"), Entry("big", bytes(100_000))]),
    ]


async def content_of(leaf: ImagesLeaf, image: str, where: Path) -> set[str]:
    """The files of the image, as a container would see them."""
    made = await leaf.prepare("look", image=image)
    with mounted(made.mounts, where) as root:
        found = {str(path.relative_to(root)) for path in root.rglob("*")}
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="look"))
    return found


@pytest.mark.parametrize("write", [write_docker_archive, write_oci_archive])
async def test_an_archive_becomes_an_image(leaf: ImagesLeaf, tmp_path: Path, write: Callable[..., Path]) -> None:
    layers = two_layers()
    config = image_config(layers, User="app", Entrypoint=["/e"], Labels={"a": "b"}, ExposedPorts={"80/tcp": {}})
    [image] = await leaf.load(write(tmp_path / "x.tar", "docker.io/library/two:1", layers, config))
    assert image.name == "docker.io/library/two:1"
    assert image.familiar_name == "two:1"
    assert image.id == digest(config)
    assert list(image.names) == [image.name]
    assert [entry.diff_id for entry in image.layers] == [digest(data) for data in layers]
    assert image.layers[1].chain_id == digest(f"{digest(layers[0])} {digest(layers[1])}".encode())
    assert image.chain_id == image.layers[1].chain_id
    assert [entry.size_bytes for entry in image.layers] == [2, 100_001]
    assert image.size_bytes == 100_003
    assert (image.config.user, list(image.config.entrypoint), image.config.labels["a"]) == ("app", ["/e"], "b")
    assert image.platform.os == "linux"
    assert len(image.history) == 2
    assert await content_of(leaf, "two:1", tmp_path / "m") == {"d", "d/new", "kept", "big"}


async def test_both_forms_of_one_image_have_one_id_and_share_their_layers(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = two_layers()
    config = image_config(layers)
    [one] = await leaf.load(write_docker_archive(tmp_path / "d.tar", "one:1", layers, config))
    said = await leaf.load_all(write_oci_archive(tmp_path / "o.tar", "two:1", layers, config))
    [two] = said[-1].result.images
    assert one.id == two.id
    assert list(two.names) == ["docker.io/library/one:1", "docker.io/library/two:1"]
    assert {p.progress.step for p in said} >= {types.Progress.STEP_EXISTS}
    snapshots = await leaf.snapshots.List(pb.ListSnapshotsRequest())
    assert len(snapshots.snapshots) == 2


@pytest.mark.parametrize("pack", PACKERS, ids=["plain", "gzip", "zstd", "bzip2", "xz"])
async def test_the_whole_archive_may_be_compressed(
    leaf: ImagesLeaf, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    layers = two_layers()
    archive = write_docker_archive(tmp_path / "x.tar", "packed:1", layers, image_config(layers))
    [image] = await leaf.load(pack(archive.read_bytes()))
    assert image.familiar_name == "packed:1"


@pytest.mark.parametrize("pack", PACKERS, ids=["plain", "gzip", "zstd", "bzip2", "xz"])
async def test_a_root_file_system_becomes_an_image_with_a_config(
    leaf: ImagesLeaf, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    rootfs = layer([directory("./"), directory("./bin"), Entry("./bin/sh", b"#!", 0o755)])
    config = pb.ImageConfig(
        user="1:2", env=["A=1"], cmd=["sh"], entrypoint=["/e"], working_dir="/w", stop_signal="SIGINT",
        volumes=["/v"], exposed_ports=["80/tcp"], labels={"k": "v"},
        healthcheck=pb.Healthcheck(test=["CMD", "x"], retries=2),
    )  # fmt: skip
    config.healthcheck.interval.seconds = 5
    [image] = await leaf.load(pack(rootfs), name="plain:1", config=config)
    assert image.config == config
    assert image.familiar_name == "plain:1"
    assert [entry.diff_id for entry in image.layers] == [digest(rootfs)]
    assert image.layers[0].blob.digest == digest(pack(rootfs)) or pack is not bytes
    assert await content_of(leaf, "plain:1", tmp_path / "m") == {"bin", "bin/sh"}


async def test_a_root_file_system_needs_a_name(leaf: ImagesLeaf) -> None:
    with pytest.raises(InvalidArgument, match="--as NAME:TAG"):
        await leaf.load(packed({"bin/sh": b""}))
    assert leaf.disk() == set()


async def test_a_root_file_system_that_looks_like_an_archive_can_be_named_as_one(leaf: ImagesLeaf) -> None:
    data = packed({"manifest.json": b"[]", "bin/sh": b""})
    with pytest.raises(InvalidArgument, match="lists no image"):
        await leaf.load(data, name="x:1")
    [image] = await leaf.load(data, name="x:1", format=Header.FORMAT_ROOTFS)
    assert image.familiar_name == "x:1"


async def test_the_given_name_replaces_the_archives(leaf: ImagesLeaf, tmp_path: Path) -> None:
    [image] = await leaf.load(write_busybox(tmp_path / "b.tar", "other:1"), name="ghcr.io/me/mine:2")
    assert image.name == "ghcr.io/me/mine:2"
    assert await leaf.names() == ["ghcr.io/me/mine:2"]


def archive_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return buffer.getvalue()


async def test_an_archive_of_several_images_with_several_names_each(leaf: ImagesLeaf) -> None:
    one, two = layer([Entry("1", b"1")]), layer([Entry("2", b"2")])
    configs = [image_config([one]), image_config([one, two])]
    table = [
        {"Config": "a.json", "RepoTags": ["a:1", "a:2"], "Layers": ["l1/layer.tar"]},
        {"Config": "b.json", "RepoTags": None, "Layers": ["l1/layer.tar", "l2/layer.tar"]},
    ]
    data = archive_of(
        {"l1/layer.tar": one, "l2/layer.tar": two, "a.json": configs[0], "b.json": configs[1],
         "manifest.json": json.dumps(table).encode()}
    )  # fmt: skip
    images = await leaf.load(data)
    assert [image.familiar_name for image in images] == ["a:1", "a:2", ""]
    assert images[2].id == digest(configs[1])
    with pytest.raises(InvalidArgument, match="cannot all be"):
        await leaf.load(data, name="x:1")


async def test_old_archives_link_to_layers_that_images_share(leaf: ImagesLeaf) -> None:
    one = layer([Entry("1", b"1")])
    config = image_config([one, one])
    table = [{"Config": "c.json", "RepoTags": ["l:1"], "Layers": ["a/layer.tar", "b/layer.tar"]}]
    data = archive_of(
        {"a/layer.tar": one, "c.json": config, "manifest.json": json.dumps(table).encode()},
        {"b/layer.tar": "../a/layer.tar"},
    )
    [image] = await leaf.load(data)
    assert len(image.layers) == 2


def oci_layout(images: dict[str, tuple[list[bytes], bytes]], *, index_name: str = "") -> bytes:
    """A layout with an index of one manifest per platform, named `index_name`, or nameless at the top."""
    blobs: dict[str, bytes] = {}

    def store(data: bytes, media_type: str, **more: object) -> dict[str, object]:
        blobs[f"blobs/sha256/{digest(data)[7:]}"] = data
        return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}

    entries = []
    for platform, (layers, config) in images.items():
        system, architecture = platform.split("/")
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": store(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [store(data, "application/vnd.oci.image.layer.v1.tar") for data in layers],
        }
        entries.append(
            store(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json",
                  platform={"os": system, "architecture": architecture})
        )  # fmt: skip
    if index_name:
        index = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
        named = {"org.opencontainers.image.ref.name": index_name}
        entries = [store(index, "application/vnd.oci.image.index.v1+json", annotations=named)]
    top = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    return archive_of({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', **blobs, "index.json": top})


@pytest.mark.parametrize("named", [True, False], ids=["index-in-layout", "layout-is-index"])
async def test_from_an_index_the_wanted_platform_is_taken_and_the_index_kept(leaf: ImagesLeaf, named: bool) -> None:
    parts = {}
    for platform in ("linux/amd64", "linux/riscv64", "unknown/unknown"):
        data = layer([Entry(platform.replace("/", "-"), b"x")])
        parts[platform] = ([data], image_config([data]))
    name = "" if named else "multi:1"
    archive = oci_layout(parts, index_name="multi:1" if named else "")
    wanted = types.Platform(os="linux", architecture="riscv64")
    [image] = await leaf.load(archive, name=name, platform=wanted)
    assert image.familiar_name == "multi:1"
    assert image.id == digest(parts["linux/riscv64"][1])
    assert image.target.media_type.endswith("index.v1+json")
    assert image.target.digest != image.manifest.digest
    stored = [blob.digest async for blob in leaf.content.List(pb.ListBlobsRequest())]
    assert digest(parts["linux/amd64"][0][0]) in stored, "the other platforms of an index are kept with it"
    with pytest.raises(NotFound, match=r"nothing for linux/s390x; it offers linux/amd64, linux/riscv64"):
        await leaf.load(archive, name=name, platform=types.Platform(os="linux", architecture="s390x"))


async def test_a_bare_word_in_a_layout_is_no_name(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = two_layers()
    [image] = await leaf.load(write_oci_archive(tmp_path / "o.tar", "latest", layers, image_config(layers)))
    assert image.name == ""
    assert (await leaf.images.Get(pb.GetImageRequest(name=image.id))).id == image.id


def run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


@needs("skopeo")
@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
async def test_what_skopeo_writes_is_imported_with_its_digests(leaf: ImagesLeaf, tmp_path: Path, form: str) -> None:
    source, target = write_busybox(tmp_path / "b.tar", "b:1"), tmp_path / "s.tar"
    copy = ["skopeo", "copy", "-q", "--insecure-policy", f"docker-archive:{source}", f"{form}:{target}:localhost/s:1"]
    run(*copy)
    manifest = run("skopeo", "inspect", "--raw", f"{form}:{target}")
    [image] = await leaf.load(target)
    assert image.name == "localhost/s:1"
    if form == "oci-archive":
        assert image.target.digest == digest(manifest)


async def test_progress_tells_of_the_transfer_and_of_every_layer(leaf: ImagesLeaf, tmp_path: Path) -> None:
    archive = write_busybox(tmp_path / "b.tar")
    *progress, last = await leaf.load_all(archive)
    assert all(response.HasField("progress") for response in progress)
    seen = {(item.progress.item, item.progress.step): item.progress for item in progress}
    transfer = seen["archive", types.Progress.STEP_TRANSFER]
    assert transfer.done_bytes == transfer.total_bytes == archive.stat().st_size
    diff_id = last.result.images[0].layers[0].diff_id
    assert seen[diff_id, types.Progress.STEP_DONE].done_bytes > 0


async def test_without_unpacking_the_first_container_unpacks(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = two_layers()
    archive = write_oci_archive(tmp_path / "o.tar", "later:1", layers, image_config(layers))
    [image] = await leaf.load(archive, no_unpack=True)
    assert image.chain_id == ""
    assert image.size_bytes == 0
    assert not any(path.startswith("overlay/") for path in leaf.disk())
    made = await leaf.prepare("c", image="later:1")
    assert made.image.chain_id != ""
    assert made.image.size_bytes == 100_003
    assert (await leaf.images.Get(pb.GetImageRequest(name="later:1"))).chain_id == made.image.chain_id


async def test_a_root_file_system_without_unpacking_is_stored_only(leaf: ImagesLeaf, tmp_path: Path) -> None:
    [image] = await leaf.load(packed({"bin/x": b"1"}), name="r:1", no_unpack=True)
    assert image.chain_id == ""
    assert not any(path.startswith("overlay/") for path in leaf.disk())
    assert await content_of(leaf, "r:1", tmp_path / "m") == {"bin", "bin/x"}


async def test_an_image_without_layers(leaf: ImagesLeaf, tmp_path: Path) -> None:
    [image] = await leaf.load(write_docker_archive(tmp_path / "x.tar", "scratch:1", [], image_config([])))
    assert len(image.layers) == 0
    assert await content_of(leaf, "scratch:1", tmp_path / "m") == set()


async def test_imports_at_once_of_the_same_and_of_other_images(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = two_layers()
    one = write_docker_archive(tmp_path / "1.tar", "one:1", layers, image_config(layers))
    two = write_oci_archive(tmp_path / "2.tar", "two:1", layers[:1], image_config(layers[:1]))
    await asyncio.gather(*[leaf.load(archive) for archive in (one, two) * 4])
    assert await leaf.names() == ["one:1", "two:1"]
    await leaf.settled()
    assert sum(path.startswith("overlay/l/") for path in leaf.disk()) == 2
    assert not any(path.startswith(("overlay/tmp/", "ingest/")) for path in leaf.disk())


async def test_many_layers(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = [layer([Entry(f"f{i}", b"x")]) for i in range(130)]
    await leaf.load(write_docker_archive(tmp_path / "x.tar", "deep:1", layers, image_config(layers)))
    assert await content_of(leaf, "deep:1", tmp_path / "m") == {f"f{i}" for i in range(130)}


async def test_a_layer_takes_directories_and_links_from_those_below(leaf: ImagesLeaf, tmp_path: Path) -> None:
    layers = [
        layer([directory("./", 0o711), directory("tmp", 0o1777), Entry("lib/a", b"a")]),
        layer([Entry("tmp/f", b"x"), Entry("lib/b", kind=tarfile.LNKTYPE, link="lib/a"), symlink("s", "lib/b")]),
    ]
    await leaf.load(write_docker_archive(tmp_path / "x.tar", "below:1", layers, image_config(layers)))
    made = await leaf.prepare("c", image="below:1")
    with mounted(made.mounts, tmp_path / "m") as root:
        assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
        assert root.stat().st_mode & 0o7777 == 0o711
        assert (root / "s").read_bytes() == b"a"


async def test_a_cancelled_import_leaves_nothing(leaf: ImagesLeaf, tmp_path: Path) -> None:
    data = write_busybox(tmp_path / "b.tar").read_bytes()
    stuck = asyncio.Event()
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async def half() -> AsyncIterator[pb.ImportRequest]:
        count = 0
        async for request in import_requests(data):
            yield request
            count += 1
            if count == 4:
                await stuck.wait()

    call = leaf.images.Import(half())
    await call.read()
    assert any(path.startswith("ingest/") for path in leaf.disk())
    call.cancel()
    for _ in range(100):
        if leaf.disk() == set():
            break
        await asyncio.sleep(0.02)
    assert leaf.disk() == set()
    stuck.set()
    await asyncio.sleep(0.1)
    gc.collect()
    assert complaints == []


async def test_a_stop_in_the_middle_of_an_import_is_quick_and_leaves_nothing(tmp_path: Path) -> None:
    data = write_busybox(tmp_path / "b.tar").read_bytes()

    async def half() -> AsyncIterator[pb.ImportRequest]:
        async for request in import_requests(data[: len(data) // 2]):
            yield request
        await asyncio.Event().wait()

    async with images_leaf(tmp_path / "images") as leaf:
        call = leaf.images.Import(half())
        await call.read()
        begun = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - begun < 10
    call.cancel()
    assert leaf.disk() == set()


async def test_the_first_message_has_to_be_the_header(leaf: ImagesLeaf) -> None:
    async def requests() -> AsyncIterator[pb.ImportRequest]:
        yield pb.ImportRequest(data=b"x")

    with pytest.raises(InvalidArgument, match="header"):
        _ = [response async for response in leaf.images.Import(requests())]


async def test_an_image_imported_again_keeps_its_names(leaf: ImagesLeaf, tmp_path: Path) -> None:
    archive = write_busybox(tmp_path / "b.tar", "b:1")
    await leaf.load(archive)
    await leaf.load(archive)
    assert await leaf.names() == ["b:1"]
    await leaf.prepare("c", image="b:1")
    with pytest.raises(AlreadyExists):
        await leaf.prepare("c")
