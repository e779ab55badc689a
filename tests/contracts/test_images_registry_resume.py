"""Pulls that end early, killed at any moment: what was fetched is not fetched again, and nothing half is to be seen."""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.corrald import Corrald
from support.faulty import Faulty, Handler, Seen, faulty_registry
from support.images import Entry, digest, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.registry import Registry, running
from support.requirements import needs
from support.throttle import Throttle, throttled

from corral.api.images.v1 import images_pb2 as pb
from corral.rpc.channel import open_channel
from corral.rpc.errors import NotFound, Unavailable

pytestmark = needs("root", "overlayfs", "docker-registry")

MIB = 1 << 20
BIG = 200 * MIB


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as made:
        yield made


@pytest.fixture(scope="module")
def noise() -> bytes:
    return random.Random(7).randbytes(BIG)


@pytest.fixture
def daemon() -> Iterator[Corrald]:
    """The images leaf alone, for a test that kills it."""
    with Corrald(services=("images",), private_names=False) as corrald:
        yield corrald


@asynccontextmanager
async def serving(daemon: Corrald, failpoints: str = "") -> AsyncIterator[ImagesLeaf]:
    daemon.start(environment={"CORRAL_FAILPOINTS": failpoints})
    channel = open_channel(daemon.address_of("images"))
    try:
        yield ImagesLeaf(channel, daemon.root / "images")
    finally:
        await channel.close()


async def put(registry: Registry, tmp_path: Path, name: str, layers: list[bytes]) -> pb.Image:
    """An image in the registry, by another corral."""
    async with images_leaf(tmp_path / "other") as other:
        archive = write_oci_archive(tmp_path / "x.tar", "x:1", layers, image_config(layers), compress=False)
        [image] = await other.load(archive, no_unpack=True)
        await other.push("x:1", f"{registry.host}/{name}:1")
    archive.unlink()
    return image


async def content(leaf: ImagesLeaf, image: str, where: Path) -> dict[str, str]:
    """The digests of its files."""
    made = await leaf.prepare("look", image=image)
    with mounted(made.mounts, where) as root:
        found = {path.name: digest(path.read_bytes()) for path in root.rglob("*") if path.is_file()}
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="look"))
    return found


def rss_bytes(daemon: Corrald) -> int:
    fields = Path(f"/proc/{daemon.processes['corrald'].pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in fields if line.startswith("VmHWM:"))


async def fetched(throttle: Throttle, wanted: int) -> None:
    for _ in range(5000):
        if throttle.sent >= wanted:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come about")


async def test_killed_in_the_middle_of_a_large_pull_it_resumes_where_it_was(
    daemon: Corrald, registry: Registry, tmp_path: Path, noise: bytes
) -> None:
    """Twice, and memory stays bounded all the while."""
    await put(registry, tmp_path, "large", [layer([Entry("noise", noise)]), layer([Entry("small", b"x")])])
    with throttled(registry.port, 40 * MIB) as throttle:
        name = f"{throttle.host}/large:1"
        for share in (0.3, 0.7):
            async with serving(daemon) as leaf:
                pulling = asyncio.ensure_future(leaf.pull(name))
                await fetched(throttle, int(BIG * share))
                assert await leaf.names() == []
                assert rss_bytes(daemon) < 150 * MIB
                daemon.kill9()
                with pytest.raises(Unavailable):
                    await pulling
        throttle.bytes_per_s = 0
        async with serving(daemon) as leaf:
            await leaf.pull(name)
            assert await content(leaf, name, tmp_path / "m") == {"noise": digest(noise), "small": digest(b"x")}
            assert throttle.sent <= 1.1 * BIG, f"{throttle.sent / BIG:.3f} times the size was fetched"
            assert rss_bytes(daemon) < 150 * MIB
            assert not list((daemon.root / "images" / "partial").iterdir())


async def test_the_event_loop_is_not_held_up_by_a_pull(registry: Registry, tmp_path: Path, noise: bytes) -> None:
    """In this very process: how late a callback comes while 200 MB are fetched, hashed and written."""
    await put(registry, tmp_path, "loop", [layer([Entry("noise", noise)])])
    late: list[float] = []

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            late.append(time.monotonic() - before - 0.005)

    async with images_leaf(tmp_path / "images") as leaf:
        watching = asyncio.ensure_future(watch())
        await leaf.pull(f"{registry.host}/loop:1")
        watching.cancel()
    late.sort()
    assert late[len(late) * 9 // 10] < 0.05, f"p90 {late[len(late) * 9 // 10]:.3f} s, worst {late[-1]:.3f} s"


STEPS = (
    "images.pull.after_piece@3",
    "images.pull.before_blob@2",
    "images.pull.after_blob@2",
    "images.write.before_row@2",
    "images.write.before_row@5",
    "images.unpack.after_sync",
    "images.pull.before_admit",
    "images.admit.before_commit",
    "images.admit.after_commit",
)


@pytest.mark.parametrize("step", STEPS)
async def test_a_pull_that_is_killed_anywhere_is_all_or_nothing(
    daemon: Corrald, registry: Registry, tmp_path: Path, noise: bytes, step: str
) -> None:
    layers = [layer([Entry(f"f{i}", noise[i * 3 * MIB : (i + 1) * 3 * MIB])]) for i in range(4)]
    image = await put(registry, tmp_path, "steps", layers)
    size = sum(map(len, layers))
    point, _, hit = step.partition("@")
    with throttled(registry.port) as throttle:
        name = f"{throttle.host}/steps:1"
        async with serving(daemon, f"{point}=kill{'@' + hit if hit else ''}") as leaf:
            with pytest.raises(Unavailable):
                await leaf.pull(name)
            await asyncio.to_thread(daemon.processes["corrald"].wait, 10)
        daemon.processes.clear()
        async with serving(daemon) as leaf:
            assert (await leaf.names() == [name]) == (point == "images.admit.after_commit")
            await consistent(leaf)
            assert (await leaf.pull(name)).target.digest == image.target.digest
            found = await content(leaf, name, tmp_path / "m")
            assert found == {f"f{i}": digest(noise[i * 3 * MIB : (i + 1) * 3 * MIB]) for i in range(4)}
            await consistent(leaf)
            assert not list((leaf.root / "partial").iterdir())
            assert throttle.sent <= 1.1 * size + 4 * MIB, "but for the pieces in flight nothing comes twice"


async def consistent(leaf: ImagesLeaf) -> None:
    """Blobs and their rows agree, and no layer is there without one."""
    for _ in range(200):
        rows = {blob.digest[7:] async for blob in leaf.content.List(pb.ListBlobsRequest())}
        files = {path.name for path in (leaf.root / "blobs/sha256").iterdir()}
        snapshots = await leaf.snapshots.List(pb.ListSnapshotsRequest())
        trees = len(list((leaf.root / "overlay/l").iterdir()))
        unfinished = list((leaf.root / "ingest").iterdir())
        if rows == files and trees == len(snapshots.snapshots) and not unfinished:
            return
        await asyncio.sleep(0.02)
    assert (rows, trees, unfinished) == (files, len(snapshots.snapshots), [])


async def test_a_power_loss_that_took_bytes_costs_a_fetch_and_no_more(
    daemon: Corrald, registry: Registry, tmp_path: Path, noise: bytes
) -> None:
    """The log tells of bytes that are not there: the digest shows it."""
    made = layer([Entry("noise", noise[: 20 * MIB])])
    await put(registry, tmp_path, "power", [made])
    with throttled(registry.port, 10 * MIB) as throttle:
        name = f"{throttle.host}/power:1"
        async with serving(daemon) as leaf:
            pulling = asyncio.ensure_future(leaf.pull(name))
            await fetched(throttle, 8 * MIB)
            daemon.kill9()
            with pytest.raises(Unavailable):
                await pulling
        [data] = (daemon.root / "images" / "partial").glob("*.data")
        with data.open("r+b") as file:
            file.seek(MIB)
            file.write(bytes(MIB))
        throttle.bytes_per_s = 0
        async with serving(daemon) as leaf:
            await leaf.pull(name)
            assert await content(leaf, name, tmp_path / "m") == {"noise": digest(noise[: 20 * MIB])}


@pytest.mark.parametrize("damage", ["torn line", "no log", "no data", "another size", "nonsense", "short data"])
async def test_whatever_is_left_of_a_partial_blob_is_made_good(tmp_path: Path, damage: str) -> None:
    made = layer([Entry("f", bytes(range(256)) * 4096)])
    root = tmp_path / "images"
    (root / "partial").mkdir(parents=True)
    data = root / "partial" / f"{digest(made)[7:]}.data"
    log = data.with_suffix(".log")
    half = len(made) // 2
    data.write_bytes(made[:half])
    log.write_text(f"{len(made)}\n0 {half}\n")
    match damage:
        case "torn line":
            log.write_text(f"{len(made)}\n0 {half}\n{half} 99")
        case "no log":
            log.unlink()
        case "no data":
            data.unlink()
        case "another size":
            log.write_text(f"{len(made) + 1}\n0 {half}\n")
        case "nonsense":
            log.write_text(f"{len(made)}\n0 x\n-5 7\n3 1\n0 {len(made) * 2}\n\n1 2 3\n")
        case "short data":
            data.write_bytes(made[: half // 2])
    with faulty_registry() as faulty:
        faulty.add_image("1", [made])
        async with images_leaf(root) as leaf:
            assert (await leaf.pull(f"{faulty.host}/x:1")).layers[0].blob.digest == digest(made)
            assert not list((root / "partial").iterdir())
        [got] = [seen.headers.get("range", "all") for seen in faulty.of(digest(made))][-1:]
        kept = {"torn line": half, "short data": half // 2}.get(damage, 0)
        assert got == (f"bytes={kept}-{len(made) - 1}" if kept else "all")


async def interrupted(root: Path, faulty: Faulty, **settings: object) -> None:
    """A pull whose client goes away in the middle of its only layer."""

    def on(handler: Handler, seen: Seen) -> bool:
        name = seen.path.rpartition("/")[2]
        if "/blobs/" not in seen.path or len(faulty.blobs[name]) < MIB:
            return False
        handler.answer(200, faulty.blobs[name][:MIB], Content_Length=str(len(faulty.blobs[name])))
        time.sleep(0.3)  # progress is told of some times a second
        handler.wfile.write(faulty.blobs[name][MIB:-1])
        handler.wfile.flush()
        time.sleep(3)
        return True

    faulty.on = on
    async with images_leaf(root, **settings) as leaf:
        call = leaf.images.Pull(pb.PullRequest(name=f"{faulty.host}/x:1"))
        async for answer in call:
            if answer.progress.done_bytes >= MIB:
                break
        call.cancel()
    faulty.on = lambda handler, seen: False


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with faulty_registry() as made:
        made.add_image("1", [layer([Entry("f", bytes(range(256)) * 8192)])])
        yield made


async def test_a_partial_blob_that_nobody_came_back_for_is_collected(tmp_path: Path, faulty: Faulty) -> None:
    root = tmp_path / "images"
    await interrupted(root, faulty)
    assert len(list((root / "partial").iterdir())) == 2
    async with images_leaf(root) as leaf:
        await asyncio.sleep(0.1)
        assert len(list((root / "partial").iterdir())) == 2, "its time is not over"
    old = time.time() - 100_000
    for path in (root / "partial").iterdir():
        os.utime(path, (old, old))
    async with images_leaf(root) as leaf:
        for _ in range(200):
            if not list((root / "partial").iterdir()):
                break
            await asyncio.sleep(0.02)
        assert not list((root / "partial").iterdir())
        with pytest.raises(NotFound):
            await leaf.images.Get(pb.GetImageRequest(name=f"{faulty.host}/x:1"))


async def test_prune_takes_partial_blobs_along(tmp_path: Path, faulty: Faulty) -> None:
    root = tmp_path / "images"
    await interrupted(root, faulty)
    async with images_leaf(root) as leaf:
        answer = await leaf.images.Prune(pb.PruneRequest())
        assert answer.reclaimed_bytes >= MIB
        assert not list((root / "partial").iterdir())
        assert not [path for path in leaf.disk() if path.startswith("blobs/")]
        await leaf.pull(f"{faulty.host}/x:1")


async def test_what_is_being_fetched_is_not_pruned(tmp_path: Path, registry: Registry, noise: bytes) -> None:
    await put(registry, tmp_path, "pruned", [layer([Entry("noise", noise[: 30 * MIB])])])
    with throttled(registry.port, 20 * MIB) as throttle:
        async with images_leaf(tmp_path / "images") as leaf:
            pulling = asyncio.ensure_future(leaf.pull(f"{throttle.host}/pruned:1"))
            while not pulling.done():
                await leaf.images.Prune(pb.PruneRequest(all=True))
                await asyncio.sleep(0.05)
            assert (await pulling).chain_id


async def test_a_layer_is_unpacked_while_others_are_still_on_their_way(tmp_path: Path, faulty: Faulty) -> None:
    import threading

    layers = [layer([Entry("first", b"1" * 100_000)]), layer([Entry("second", b"2")])]
    faulty.add_image("2", layers)
    unpacked = threading.Event()

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(layers[1]) in seen.path:
            assert unpacked.wait(20)
        return False

    faulty.on = on
    async with images_leaf(tmp_path / "images") as leaf:
        done = []
        async for answer in leaf.images.Pull(pb.PullRequest(name=f"{faulty.host}/x:2")):
            if answer.progress.step == answer.progress.STEP_DONE:
                done.append(answer.progress.item)
                unpacked.set()
        assert done == [digest(data) for data in layers]
