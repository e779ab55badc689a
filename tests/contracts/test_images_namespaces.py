"""Blobs are on disk once, for all namespaces; but none sees, hears of or waits for what only another has brought."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from support.faulty import OCI_MANIFEST, Faulty, Handler, Seen, faulty_registry, manifest_of
from support.faulty_images import big, small, until
from support.images import Entry, digest, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.images.store import MIGRATIONS
from corral.rpc.context import in_namespace
from corral.rpc.errors import InvalidArgument, NotFound, PermissionDenied

pytestmark = needs("root", "overlayfs")


@pytest.mark.parametrize("status", [404, 403])
async def test_naming_a_digest_does_not_give_what_another_namespace_has_brought(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, status: int
) -> None:
    """Somebody else's registry names the layer, and even says that it is there; but it cannot give it."""
    made = small(faulty)
    await leaf.pull(f"{faulty.host}/x:1")
    config = image_config([made], Cmd=["/evil"])
    mirror.add("1", OCI_MANIFEST, manifest_of(mirror, [made], config))
    del mirror.blobs[digest(made)]

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) not in seen.path:
            return False
        if seen.method == "HEAD":
            handler.answer(200, Content_Length=str(len(made)))
        else:
            handler.answer(status)
        return True

    mirror.on = on
    with in_namespace("evil"):
        with pytest.raises((NotFound, PermissionDenied)):
            await leaf.pull(f"{mirror.host}/x:1")
        assert await leaf.names() == []
    await leaf.settled()
    assert sum(path.startswith("overlay/l/") for path in leaf.disk()) == 1


async def test_nor_does_naming_a_manifest(leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty) -> None:
    small(faulty)
    await leaf.pull(f"{faulty.host}/x:1")
    _, hidden = faulty.manifests["1"]
    entry = {"mediaType": OCI_MANIFEST, "digest": digest(hidden), "size": len(hidden),
             "platform": {"os": "linux", "architecture": "amd64"}}  # fmt: skip
    index = "application/vnd.oci.image.index.v1+json"
    mirror.add("1", index, json.dumps({"schemaVersion": 2, "mediaType": index, "manifests": [entry]}).encode())
    with in_namespace("evil"), pytest.raises(NotFound):
        await leaf.pull(f"{mirror.host}/x:1")


async def test_who_can_fetch_it_has_it_too_and_it_is_on_disk_once(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty
) -> None:
    made = small(faulty)
    small(mirror)
    mine = await leaf.pull(f"{faulty.host}/x:1")
    before = leaf.disk()
    for _ in range(2):
        with in_namespace("other"):
            theirs = await leaf.pull(f"{mirror.host}/x:1")
    assert (theirs.id, theirs.chain_id) == (mine.id, mine.chain_id)
    assert len(mirror.of(digest(made))) == 1
    assert leaf.disk() == before


async def test_a_namespace_does_not_wait_for_what_another_one_fetches(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty
) -> None:
    made = big(faulty)
    big(mirror)
    held = threading.Event()

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) in seen.path:
            held.wait(30)
        return False

    faulty.on = on
    first = asyncio.ensure_future(leaf.pull(f"{faulty.host}/x:1"))
    await until(lambda: bool(faulty.of(digest(made))))
    with in_namespace("other.team"):
        async with asyncio.timeout(20):
            await leaf.pull(f"{mirror.host}/x:1")
    assert not first.done()
    held.set()
    await first
    assert not [path for path in leaf.disk() if path.startswith("partial/")]


async def test_what_a_namespace_has_begun_to_fetch_is_not_gone_on_with_by_another(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty
) -> None:
    """Else the rest alone would be enough to see all of it."""
    made = big(faulty)
    big(mirror)
    cut = len(made) // 2

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) not in seen.path or "range" not in seen.headers:
            return False
        if seen.headers["range"].startswith("bytes=0-"):
            return False
        handler.answer(403)
        return True

    faulty.on = on
    with pytest.raises(PermissionDenied):
        await leaf.pull(f"{faulty.host}/x:1")
    assert [path for path in leaf.disk() if path.startswith("partial/")]
    with in_namespace("other"):
        await leaf.pull(f"{mirror.host}/x:1")
    asked = [seen.headers["range"][6:].split("-") for seen in mirror.of(digest(made))]
    assert sum(int(end) - int(start) + 1 for start, end in asked) == len(made) > cut


async def test_blobs_are_listed_and_read_by_those_who_have_brought_them(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = small(faulty)
    await leaf.pull(f"{faulty.host}/x:1")
    name = digest(made)

    async def read() -> bytes:
        return b"".join([part.data async for part in leaf.content.Read(pb.ReadBlobRequest(digest=name))])

    assert await read() == made
    with in_namespace("other"):
        assert [blob async for blob in leaf.content.List(pb.ListBlobsRequest())] == []
        with pytest.raises(NotFound):
            await leaf.content.Info(pb.BlobInfoRequest(digest=name))
        with pytest.raises(NotFound):
            await read()
        await leaf.content.Write(write(made))
        assert await read() == made
        assert [blob.digest async for blob in leaf.content.List(pb.ListBlobsRequest())] == [name]


async def write(data: bytes) -> AsyncIterator[pb.WriteBlobRequest]:
    yield pb.WriteBlobRequest(data=data)


async def test_a_push_does_not_tell_in_which_repositories_another_namespace_has_seen_a_blob(
    leaf: ImagesLeaf, faulty: Faulty
) -> None:
    """They may be private, and their names secrets."""
    small(faulty)
    await leaf.pull(f"{faulty.host}/secret/x:1")
    with faulty_registry() as mirror:
        mirror.manifests, mirror.blobs = faulty.manifests, faulty.blobs
        with in_namespace("other"):
            image = await leaf.pull(f"{mirror.host}/x:1")
            await leaf.images.Tag(pb.TagImageRequest(source=image.name, target=f"{faulty.host}/y:1"))
            faulty.blobs = {}
            faulty.on = lambda handler, seen: seen.path == "/v2/" and handler.answer(200) is None
            with pytest.raises(NotFound):
                await leaf.push(f"{faulty.host}/y:1")
    posted = faulty.of("/blobs/uploads/", "POST")
    assert posted
    assert not [seen for seen in posted if "secret" in seen.path]


async def test_a_blob_that_is_here_is_as_long_as_its_manifest_says(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = layer([Entry("f", b"x")])
    faulty.add_image("1", [made])
    await leaf.pull(f"{faulty.host}/x:1")
    document = json.loads(manifest_of(faulty, [made], image_config([made], Cmd=["/f"])))
    document["layers"][0]["size"] += 1
    faulty.add("2", OCI_MANIFEST, json.dumps(document).encode())
    with pytest.raises(InvalidArgument, match=f"blob {digest(made)} has {len(made)} bytes, not {len(made) + 1}") as e:
        await leaf.pull(f"{faulty.host}/x:2")
    assert e.value.reason == "SIZE_MISMATCH"


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_config_that_tells_of_anothers_layers_does_not_give_them(
    leaf: ImagesLeaf, tmp_path: Path, when: str
) -> None:
    """Neither if they are here when it comes, nor if they come to be here later."""
    secret, junk = [layer([Entry("secret", b"x")])], [layer([Entry("junk", b"y")])]
    config = image_config(secret)
    theirs = write_oci_archive(tmp_path / "theirs.tar", "x:1", secret, config)
    mine = write_oci_archive(tmp_path / "mine.tar", "x:1", junk, config)

    async def bring_theirs() -> None:
        await leaf.load(theirs, no_unpack=True)
        await leaf.prepare("c", image="x:1")

    if when == "before":
        await bring_theirs()
    with in_namespace("evil"):
        await leaf.load(mine, no_unpack=True)
    if when == "after":
        await bring_theirs()
    with in_namespace("evil"), pytest.raises(InvalidArgument, match=f"the image's config says {digest(secret[0])}"):
        await leaf.prepare("d", image="x:1")


def test_what_namespaces_have_is_kept_when_an_older_database_is_opened(tmp_path: Path) -> None:
    which = next(n for n, text in enumerate(MIGRATIONS) if "CREATE TABLE blob_holders" in text)
    with closing(sqlite3.connect(tmp_path / "x.db")) as database:
        for text in MIGRATIONS[:which]:
            database.executescript(text)
        for name in ("index", "manifest", "layer", "leased", "stray"):
            database.execute("INSERT INTO blobs VALUES (?, 1, 1, 0)", (name,))
        database.executemany("INSERT INTO blob_edges VALUES (?, ?)", [("index", "manifest"), ("manifest", "layer")])
        for namespace, target in (("a", "index"), ("b", "manifest")):
            database.execute(
                "INSERT INTO images (namespace, name, image_id, target_digest, target_type, target_size,"
                " manifest_digest, manifest_type, manifest_size, chain_id, updated_ns)"
                " VALUES (?, 'x', 'i', ?, '', 1, 'manifest', '', 1, '', 1)",
                (namespace, target),
            )
        database.execute("INSERT INTO leases VALUES ('b', 'l', 1, 1, '{}')")
        database.execute("INSERT INTO lease_resources VALUES ('b', 'l', 'blob', 'leased')")
        database.executescript(MIGRATIONS[which])
        found = database.execute("SELECT namespace, digest FROM blob_holders ORDER BY namespace, digest").fetchall()
    assert found == [
        ("a", "index"), ("a", "layer"), ("a", "manifest"), ("b", "layer"), ("b", "leased"), ("b", "manifest"),
    ]  # fmt: skip
