"""Every image of the corpus (support.hostile), brought in every way in which it can come: refused or contained.

After each one the canary beside is what it was, and so is what there is of images: no image, snapshot, blob, mount or
process stays of one that was refused, and none of one that was contained once it is removed.
"""

import asyncio
import json
import os
import socket
import sys
import tarfile
import urllib.error
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
import pytest_asyncio
from support.corrald import Corrald
from support.hostile import ARCHIVES, CORPUS, PULLED, ArchiveCase, Case, DocumentCase
from support.hostile.case import MAX_BYTES, MAX_ENTRIES, MAX_MEMORY_BYTES, Blob, Documents, plain
from support.hostile.members import layout
from support.images import digest, image_config
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.registry import Registry, running
from support.requirements import needs
from support.tars import archive, member

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2 as types
from corral.rpc.channel import open_channel
from corral.rpc.errors import CorralError, PermissionDenied

pytestmark = needs("root", "overlayfs")
in_one_loop = pytest.mark.asyncio(loop_scope="module")

HOST = types.Platform(os="linux", architecture="amd64")
DRIVERS = ("overlayfs", "erofs", "native")


def names(cases: Sequence[Case | ArchiveCase | DocumentCase]) -> list[str]:
    return [case.name for case in cases]


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    for cases in (CORPUS, ARCHIVES, PULLED):
        assert len(set(names(cases))) == len(cases)
    assert len(CORPUS) + len(ARCHIVES) + len(PULLED) >= 200


@dataclass(frozen=True, slots=True)
class World:
    """The leaf, and what must not change around it. The directory is the test's own."""

    leaf: ImagesLeaf
    directory: Path

    @property
    def canary(self) -> Path:
        return self.directory / "canary"

    def around(self) -> dict[str, object]:
        """Everything beside the leaf's own directory, and all mounts."""
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        above = self.leaf.root.parent
        found: dict[str, object] = {
            "mounts": [line for line in mounts if str(self.directory) in line or str(above) in line]
        }
        for path in (self.directory, above, self.leaf.root, *sorted(self.canary.rglob("*")), self.canary):
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_uid, status.st_nlink if path.is_file() else 0)
            if self.canary in (path, *path.parents):
                data = path.read_bytes() if path.is_file() else b""
                found[str(path)] = (status.st_mode, status.st_uid, status.st_mtime_ns, os.listxattr(path), data)
        found["beside"] = sorted(path.name for beside in {self.directory, above} for path in beside.iterdir())
        found["root"] = sorted(path.name for path in self.leaf.root.iterdir() if path.is_dir())
        return found

    async def inside(self) -> dict[str, object]:
        """Everything that the leaf has, once collected."""
        await self.leaf.images.Prune(pb.PruneRequest())
        await self.leaf.settled()
        snapshots = await self.leaf.snapshots.List(pb.ListSnapshotsRequest())
        return {
            "names": await self.leaf.names(),
            "snapshots": sorted(snapshot.key for snapshot in snapshots.snapshots),
            "disk": self.disk(),
        }

    def disk(self) -> set[str]:
        """Every blob, tree, part and unfinished thing; those made ready for nobody yet have an owner soon."""
        found = set()
        for above in self.leaf.root.glob("*/*"):
            if above.is_dir() and above.parent.name != "run" and above.name != "r":
                found |= {str(path.relative_to(self.leaf.root)) for path in above.iterdir()}
        return found | {str(path) for name in ("ingest", "partial") for path in (self.leaf.root / name).iterdir()}


@asynccontextmanager
async def bounded_leaf(directory: Path, **settings: object) -> AsyncIterator[ImagesLeaf]:
    bounds = {
        "max_layer_bytes": MAX_BYTES, "max_layer_entries": MAX_ENTRIES, "max_archive_bytes": 3 * MAX_BYTES,
        "unpack_memory_bytes": MAX_MEMORY_BYTES, "unpack_workers": 1,
    }  # fmt: skip
    before = children()
    async with images_leaf(directory / "images", **{**bounds, **settings}) as leaf:
        yield leaf
    assert children() <= before, "every process that unpacked has ended"


@asynccontextmanager
async def world(directory: Path, leaf: ImagesLeaf) -> AsyncIterator[World]:
    canary = directory / "canary"
    canary.mkdir()
    (canary / "kept").write_bytes(b"kept")
    before = children()
    yield World(leaf, directory)
    assert len(children() - before) <= 1, "there is one process that unpacks"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def long_lived(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ImagesLeaf]:
    """One leaf for many cases, with the driver asked for: what one does to it would show at the next."""
    driver = getattr(request, "param", DRIVERS[0])
    async with bounded_leaf(tmp_path_factory.mktemp("leaf"), driver=driver) as leaf:
        yield leaf


@pytest_asyncio.fixture(loop_scope="module")
async def here(long_lived: ImagesLeaf, tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, long_lived) as made:
        yield made


def children() -> set[str]:
    """Processes of this one that unpack."""
    pids = [pid for task in Path("/proc/self/task").iterdir() for pid in told(task / "children").split()]
    return {pid for pid in pids if "corral.images.layers" in told(Path(f"/proc/{pid}/cmdline"))}


def told(of_process: Path) -> str:
    """A file of /proc, which is empty once its thread or process has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return of_process.read_text()
    return ""


type Bring = Callable[[], Awaitable[object]]


async def refused(world: World, bring: Bring, words: str) -> None:
    """It is, in one sentence, and nothing of it is left."""
    around, inside = world.around(), await world.inside()
    with pytest.raises(CorralError) as caught:
        await asyncio.wait_for(bring(), 60)
    sentence = caught.value.message
    assert words in sentence
    assert sentence.isprintable(), sentence
    assert len(sentence) < 700
    assert "fault of corral" not in sentence
    assert world.around() == around
    assert await world.inside() == inside


async def contained(world: World, bring: Bring, case: Case) -> None:
    """It comes, can be looked at, and goes without a trace."""
    around, inside = world.around(), await world.inside()
    await asyncio.wait_for(bring(), 60)
    made = await world.leaf.view("look", image="bad:1")
    with mounted(made.mounts, world.directory / "root") as root:
        case.check(root, world.canary)
    (world.directory / "root").rmdir()
    written = await world.leaf.prepare("write", image="bad:1")
    assert written.mounts
    for key in ("look", "write"):
        await world.leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key))
    await world.leaf.images.Remove(pb.RemoveImageRequest(name="bad:1"))
    assert world.around() == around
    assert await world.inside() == inside


async def judged(world: World, bring: Bring, case: Case, words: str) -> None:
    if words:
        await refused(world, bring, words)
    else:
        await contained(world, bring, case)


def blobs_of(case: Case, canary: Path) -> list[Blob]:
    return [each if isinstance(each, Blob) else plain(each) for each in case.build(canary)]


def config_of(blobs: Sequence[Blob]) -> bytes:
    config = json.loads(image_config([]))
    config["rootfs"]["diff_ids"] = [blob.diff_id for blob in blobs]
    return json.dumps(config).encode()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as target:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, BytesIO(data))
    return buffer.getvalue()


def docker_archive(blobs: Sequence[Blob]) -> bytes:
    config = config_of(blobs)
    layers = {f"{i}/layer.tar": blob.data for i, blob in enumerate(blobs)}
    table = [{"Config": f"{digest(config)[7:]}.json", "RepoTags": ["bad:1"], "Layers": list(layers)}]
    return tar({**layers, f"{digest(config)[7:]}.json": config, "manifest.json": json.dumps(table).encode()})


def described(data: bytes, media_type: str) -> dict[str, object]:
    return {"mediaType": f"application/vnd.oci.image.{media_type}", "digest": digest(data), "size": len(data)}


def documents_of(blobs: Sequence[Blob]) -> Documents:
    config = config_of(blobs)
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described(config, "config.v1+json"),
        "layers": [described(blob.data, "layer.v1.tar+gzip") for blob in blobs],
    }
    kept = {digest(data): data for data in (config, *(blob.data for blob in blobs))}
    return Documents(kept, json.dumps(manifest).encode(), str(manifest["mediaType"]))


def oci_archive(documents: Documents) -> bytes:
    target = {"mediaType": documents.media_type, "digest": digest(documents.target), "size": len(documents.target)}
    named = target | {"annotations": {"io.containerd.image.name": "docker.io/library/bad:1"}}
    blobs = {**documents.blobs, digest(documents.target): documents.target}
    return layout({"schemaVersion": 2, "manifests": [named]}, blobs)


@pytest.mark.parametrize("case", CORPUS, ids=names(CORPUS))
@in_one_loop
async def test_a_hostile_layer_is_refused_or_contained_in_every_archive(here: World, case: Case) -> None:
    blobs = blobs_of(case, here.canary)
    await judged(here, lambda: here.leaf.load(docker_archive(blobs)), case, case.refused)
    await judged(here, lambda: here.leaf.load(oci_archive(documents_of(blobs))), case, case.refused)
    if len(blobs) == 1 and not case.has_below:
        form = pb.ImportHeader.FORMAT_ROOTFS
        words = case.refused_as_rootfs or case.refused
        if "config" in words:
            return  # there is none
        await judged(here, lambda: here.leaf.load(blobs[0].data, name="bad:1", format=form), case, words)


@pytest.mark.parametrize("long_lived", DRIVERS[1:], indirect=True)
@pytest.mark.parametrize("case", CORPUS, ids=names(CORPUS))
@in_one_loop
async def test_a_hostile_layer_is_the_same_to_every_kind_of_driver(here: World, case: Case) -> None:
    await judged(here, lambda: here.leaf.load(docker_archive(blobs_of(case, here.canary))), case, case.refused)


@pytest.mark.parametrize("case", ARCHIVES, ids=names(ARCHIVES))
@in_one_loop
async def test_a_hostile_archive_is_refused(here: World, case: ArchiveCase) -> None:
    data = case.build(here.canary)
    await refused(here, lambda: here.leaf.load(data), case.refused)


@pytest.mark.parametrize("case", PULLED, ids=names(PULLED))
@in_one_loop
async def test_hostile_documents_are_refused_in_a_layout(here: World, case: DocumentCase, elsewhere: str) -> None:
    data = oci_archive(case.build(elsewhere))
    await refused(here, lambda: here.leaf.load(data, platform=HOST), case.refused)


@needs("setpriv")
async def test_a_device_that_corral_itself_may_not_make_is_refused(tmp_path: Path) -> None:
    """By a daemon without the right, in a process of its own; whiteouts need none."""
    without = ("setpriv", "--bounding-set=-mknod", "--inh-caps=-mknod", sys.executable, "-m", "corral.daemon")
    with Corrald(services=("images",), command=without) as daemon:
        daemon.start()
        channel = open_channel(daemon.address_of("images"))
        try:
            leaf = ImagesLeaf(channel, daemon.root / "images")
            device = docker_archive([plain(archive(member(b"null", kind=b"3", device=(1, 3))))])
            with pytest.raises(PermissionDenied, match=r"entry 'null' cannot be made.*needs to be root"):
                await leaf.load(device)
            assert await leaf.names() == []
            assert leaf.disk() == set()
            fine = [plain(archive(member(b"f", b"x"))), plain(archive(member(b".wh.f"), member(b"g")))]
            await leaf.load(docker_archive(fine))
            assert await leaf.names() == ["bad:1"]
        finally:
            await channel.close()


# From a registry


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """An address at which nobody may ask for anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/layer"
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    more = {"validation": {"manifests": {"urls": {"allow": ["^http://127.0.0.1"]}}}}
    with running(tmp_path_factory.mktemp("registry"), more=more) as made:
        yield made


def put(registry: Registry, documents: Documents) -> str:
    """Into the registry, as anybody could; the name there. Raises HTTPError if it does not take it."""
    for name, data in documents.blobs.items():
        if data.startswith(b'{"schemaVersion"') and b'"mediaType"' in data[:60]:
            kind = json.loads(data)["mediaType"]
            registry.request("PUT", f"bad/manifests/{name}", {"Content-Type": kind}, data)
            continue
        headers, _ = registry.request("POST", "bad/blobs/uploads/", {"Content-Length": "0"}, b"")
        where = headers["Location"].partition("/v2/")[2]
        path = f"{where}{'&' if '?' in where else '?'}digest={name}"
        registry.request("PUT", path, {"Content-Type": "application/octet-stream"}, data)
    headers = {"Content-Type": documents.media_type}
    registry.request("PUT", "bad/manifests/1", headers, documents.target)
    return f"{registry.host}/bad:1"


@needs("docker-registry")
@pytest.mark.parametrize("case", CORPUS, ids=names(CORPUS))
@in_one_loop
async def test_a_hostile_layer_is_refused_or_contained_in_a_pull(here: World, registry: Registry, case: Case) -> None:
    name = put(registry, documents_of(blobs_of(case, here.canary)))

    async def bring() -> None:
        await here.leaf.pull(name)
        await here.leaf.images.Tag(pb.TagImageRequest(source=name, target="bad:1"))
        await here.leaf.images.Remove(pb.RemoveImageRequest(name=name))

    await judged(here, bring, case, case.refused)


DOCUMENTS_OF_A_REGISTRY = [case for case in PULLED if not case.archive_only]


@needs("docker-registry")
@pytest.mark.parametrize("case", DOCUMENTS_OF_A_REGISTRY, ids=names(DOCUMENTS_OF_A_REGISTRY))
@in_one_loop
async def test_hostile_documents_are_refused_in_a_pull(
    here: World, registry: Registry, elsewhere: str, case: DocumentCase
) -> None:
    try:
        name = put(registry, case.build(elsewhere))
    except urllib.error.HTTPError as e:
        pytest.fail(f"the registry did not take it, which case.archive_only should say: {e.read()[:300]!r}")
    await refused(here, lambda: here.leaf.pull(name, platform=HOST), case.refused_pull or case.refused)
