"""Pulls at the same time, those that go away, and what they leave for the next."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.faulty import OCI_LAYER, Faulty, Handler, Seen
from support.faulty_images import big, small, until
from support.images import digest
from support.images_leaf import ImagesLeaf
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.images.digest import Digest
from corral.images.model import Descriptor
from corral.images.reference import parse_reference
from corral.images.registry.credentials import ANONYMOUS
from corral.images.registry.download import Download
from corral.images.registry.downloads import Wanted, _Shared
from corral.images.registry.http import Http
from corral.images.registry.repository import open_repository
from corral.rpc.errors import NotFound

pytestmark = needs("root", "overlayfs")


def listeners(leaf: ImagesLeaf, made: bytes) -> int:
    """Pulls that wait for the blob."""
    shared = leaf.service._registries.puller._downloads._under_way.get(("default", Digest(digest(made))))
    return len(shared.listeners) if shared else 0


async def test_two_pulls_of_the_same_blob_share_one_download(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = big(faulty)
    arrived = threading.Event()

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) in seen.path:
            arrived.wait(20)
        return False

    faulty.on = on
    pulls = [asyncio.ensure_future(leaf.pull(f"{faulty.host}/{name}:1")) for name in ("x", "y")]
    await until(lambda: listeners(leaf, made) == 2)
    arrived.set()
    one, two = await asyncio.gather(*pulls)
    assert one.id == two.id
    ranges = [seen.headers["range"] for seen in faulty.of(digest(made))]
    assert len(ranges) == len(set(ranges)) == 3


async def test_one_that_goes_away_does_not_take_a_shared_download_along(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = big(faulty)
    arrived = threading.Event()

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) in seen.path:
            arrived.wait(20)
        return False

    faulty.on = on
    first = leaf.images.Pull(pb.PullRequest(name=f"{faulty.host}/x:1"))
    reading = asyncio.ensure_future(_drain(first))
    await until(lambda: bool(faulty.of(digest(made))))
    second = asyncio.ensure_future(leaf.pull(f"{faulty.host}/y:1"))
    await until(lambda: listeners(leaf, made) == 2)
    first.cancel()
    await asyncio.wait((reading,))
    arrived.set()
    assert (await second).name == f"{faulty.host}/y:1"
    assert len(faulty.of(digest(made))) == 3
    assert await leaf.names() == [f"{faulty.host}/y:1"]


async def _drain(call: AsyncIterator[object]) -> None:
    async for _ in call:
        pass


async def test_who_comes_while_a_cancelled_download_ends_starts_it_again(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = big(faulty)
    held = threading.Event()
    inner = leaf.service._partials

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) in seen.path:
            held.wait(0.5)
        return False

    faulty.on = on
    for _ in range(3):
        first = asyncio.ensure_future(leaf.pull(f"{faulty.host}/x:1"))
        await until(lambda: bool(inner._open))
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0)
        second = asyncio.ensure_future(leaf.pull(f"{faulty.host}/y:1"))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.wait((first, second))
    held.set()
    first = asyncio.ensure_future(leaf.pull(f"{faulty.host}/x:1"))
    await until(lambda: bool(inner._open))
    first.cancel()
    assert (await leaf.pull(f"{faulty.host}/y:1")).chain_id
    await asyncio.wait((first,))


async def test_who_comes_in_the_moment_in_which_a_download_fails_starts_anew(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = small(faulty)
    downloads = leaf.service._registries.puller._downloads
    descriptor = Descriptor(OCI_LAYER, Digest(digest(made)), len(made))
    reference = parse_reference(f"{faulty.host}/x:1")
    http = Http()
    repository = await open_repository(http, Path("/nonexistent"), reference, ANONYMOUS, insecure=False)
    wanted = Wanted(descriptor, "default", "", 60.0)
    del faulty.blobs[digest(made)]
    late: list[asyncio.Task[bool]] = []

    def come(_: object) -> None:
        work = downloads._join(repository, wanted, lambda *_: None)
        late.append(asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True))

    task = asyncio.ensure_future(downloads._fetch(repository, wanted, lambda *_: None))
    key = "default", descriptor.digest
    downloads._under_way[key] = _Shared(task)
    task.add_done_callback(come)
    task.add_done_callback(lambda _: downloads._under_way.pop(key))
    await asyncio.wait((task,))
    assert not late[0].done(), "it would be asked again and again, and nobody else would have a turn"
    assert not await late[0]
    with pytest.raises(NotFound):
        await downloads.fetch(repository, wanted, lambda *_: None)
    await http.close()


async def test_a_file_is_open_as_long_as_a_cancelled_download_writes_it(
    leaf: ImagesLeaf, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file may have the number of one that was closed under a writer. The disk is slow here."""
    made = small(faulty)
    writing, go_on = threading.Event(), threading.Event()
    found: list[str] = []
    pwrite = os.pwrite

    def slowly(fd: int, data: bytes, offset: int) -> int:
        writing.set()
        assert go_on.wait(20)
        found.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        return pwrite(fd, data, offset)

    descriptor = Descriptor(OCI_LAYER, Digest(digest(made)), len(made))
    http = Http()
    reference = parse_reference(f"{faulty.host}/x:1")
    repository = await open_repository(http, Path("/nonexistent"), reference, ANONYMOUS, insecure=False)

    async def download() -> None:
        async with leaf.service._partials.opened("default", descriptor.digest, len(made)) as partial:
            monkeypatch.setattr(os, "pwrite", slowly)
            await Download(repository, descriptor, partial, lambda _: None).run()

    task = asyncio.ensure_future(download())
    await until(writing.is_set)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.02)
    assert not task.done()
    go_on.set()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert found == [f"{digest(made)[7:]}.data"]
    await http.close()


async def test_what_a_cancelled_pull_has_fetched_is_kept_for_the_next(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = big(faulty)
    part = 16 << 20
    held = threading.Event()

    def on(handler: Handler, seen: Seen) -> bool:
        start = seen.headers.get("range", "bytes=0-")[6:].partition("-")[0]
        if digest(made) in seen.path and int(start) >= part:
            held.wait(20)
        return False

    faulty.on = on
    call = leaf.images.Pull(pb.PullRequest(name=f"{faulty.host}/x:1"))
    async for answer in call:
        if answer.progress.item == digest(made) and answer.progress.done_bytes >= part:
            break
    call.cancel()
    held.set()
    await until(lambda: not leaf.service._registries.puller._downloads._under_way)
    assert [path for path in leaf.disk() if path.startswith("partial/")]
    faulty.seen.clear()
    await leaf.pull(f"{faulty.host}/x:1")
    assert all(int(seen.headers["range"][6:].partition("-")[0]) >= part for seen in faulty.of(digest(made)))
    assert not [path for path in leaf.disk() if path.startswith("partial/")]
