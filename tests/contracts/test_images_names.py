"""Images by name: get, list, tag, remove, prune; what nothing refers to goes, what is used stays."""

from pathlib import Path

import pytest
from support.images import Entry, digest, image_config, layer, write_docker_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.overlay import mounted
from support.requirements import needs
from support.tars import packed

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2 as types
from corral.images.wire import from_image
from corral.rpc.context import in_namespace
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound

pytestmark = needs("root", "overlayfs")


async def load(leaf: ImagesLeaf, tmp_path: Path, name: str, *contents: str) -> pb.Image:
    """An image of one layer per content."""
    layers = [layer([Entry(content, content.encode() * 1000)]) for content in contents]
    [image] = await leaf.load(write_docker_archive(tmp_path / "x.tar", name, layers, image_config(layers)))
    return image


async def get(leaf: ImagesLeaf, name: str) -> pb.Image:
    return await leaf.images.Get(pb.GetImageRequest(name=name))


async def remove(leaf: ImagesLeaf, name: str, *, force: bool = False) -> pb.RemoveImageResponse:
    return await leaf.images.Remove(pb.RemoveImageRequest(name=name, force=force))


async def tag(leaf: ImagesLeaf, source: str, target: str) -> pb.Image:
    return await leaf.images.Tag(pb.TagImageRequest(source=source, target=target))


async def test_an_image_is_found_by_every_way_to_name_it(leaf: ImagesLeaf, tmp_path: Path) -> None:
    image = await load(leaf, tmp_path, "ghcr.io/a/b:1", "x")
    hexes = image.id[7:]
    for name in ("ghcr.io/a/b:1", image.id, hexes, hexes[:4], hexes[:12], f"sha256:{hexes[:9]}",
                 f"ghcr.io/a/b@{image.target.digest}"):  # fmt: skip
        assert (await get(leaf, name)).id == image.id
    for name in ("ghcr.io/a/b", "b:1", hexes[:3], f"ghcr.io/a/c@{image.target.digest}", "0" * 64):
        with pytest.raises(NotFound):
            await get(leaf, name)


async def test_a_name_goes_before_an_id_that_begins_like_it(leaf: ImagesLeaf, tmp_path: Path) -> None:
    first = await load(leaf, tmp_path, "x:1", "x")
    other = await load(leaf, tmp_path, f"{first.id[7:13]}:latest", "y")
    assert (await get(leaf, first.id[7:13])).id == other.id


async def test_an_ambiguous_prefix_is_refused(leaf: ImagesLeaf, tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    database = leaf.service._database
    for i in range(2):
        image = await load(leaf, tmp_path, f"i{i}:1", f"c{i}")
        seen[image.id] = image.name
    fakes = [f"sha256:abcd{i}" + "0" * 59 for i in range(2)]
    for real, fake in zip(seen, fakes, strict=True):
        await database.write(
            lambda t, r=real, f=fake: t.execute("UPDATE images SET image_id = ? WHERE image_id = ?", (f, r))
        )
    with pytest.raises(InvalidArgument, match=r"'abcd' is the beginning of 2 image ids \(abcd0000"):
        await get(leaf, "abcd")


async def test_list_takes_patterns(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await load(leaf, tmp_path, "busybox:1", "x")
    for target in ("busybox:2", "busyness:1", "ghcr.io/a/busybox:1"):
        await tag(leaf, "busybox:1", target)

    async def names(pattern: str) -> list[str]:
        found = await leaf.images.List(pb.ListImagesRequest(pattern=pattern))
        return [image.familiar_name for image in found.images]

    assert len(await names("")) == 4
    assert await names("busybox") == ["busybox:1", "busybox:2"]
    assert await names("busy*:1") == ["busybox:1", "busyness:1"]
    assert await names("*/busybox:?") == ["ghcr.io/a/busybox:1"]
    assert await names("docker.io/library/busy*") == ["busybox:1", "busybox:2", "busyness:1"]
    assert await names("nothing*") == []


async def test_a_tag_is_another_name_and_moves(leaf: ImagesLeaf, tmp_path: Path) -> None:
    one, two = await load(leaf, tmp_path, "one:1", "x"), await load(leaf, tmp_path, "two:1", "y")
    tagged = await tag(leaf, "one:1", "both:1")
    assert tagged.id == one.id
    assert list(tagged.names) == ["docker.io/library/both:1", "docker.io/library/one:1"]
    assert (await tag(leaf, two.id[7:20], "both:1")).id == two.id
    assert list((await get(leaf, "one:1")).names) == ["docker.io/library/one:1"]
    with pytest.raises(InvalidArgument, match="without one"):
        await tag(leaf, "one:1", f"x@{one.target.digest}")


async def test_an_image_that_loses_its_last_name_stays_nameless_until_prune(leaf: ImagesLeaf, tmp_path: Path) -> None:
    one, two = await load(leaf, tmp_path, "one:1", "x"), await load(leaf, tmp_path, "two:1", "y")
    await tag(leaf, "two:1", "one:1")
    assert (await get(leaf, one.id)).name == ""
    assert sorted(await leaf.names()) == ["", "one:1", "two:1"]
    again = await tag(leaf, one.id, "again:1")
    assert again.id == one.id
    assert "" not in await leaf.names()
    await tag(leaf, "two:1", "again:1")
    pruned = await leaf.images.Prune(pb.PruneRequest())
    assert list(pruned.untagged) == []
    assert one.id in pruned.deleted
    assert pruned.reclaimed_bytes > 0
    assert two.id not in pruned.deleted
    with pytest.raises(NotFound):
        await get(leaf, one.id)


async def test_an_image_that_goes_while_it_is_told_of_is_no_fault(leaf: ImagesLeaf, tmp_path: Path) -> None:
    """Of its layers those stay that another image has. So it was with a pull, whose image went before its answer."""
    await load(leaf, tmp_path, "one:1", "shared", "own")
    await load(leaf, tmp_path, "two:1", "shared")
    images = leaf.service._images
    record = images.find("default", "one:1")
    from_image(images.view(record))
    await remove(leaf, "one:1")
    told = from_image(images.view(record))
    assert [each.size_bytes for each in told.layers] == [0, 0]


async def test_with_the_last_name_goes_all_that_only_this_image_used(leaf: ImagesLeaf, tmp_path: Path) -> None:
    one = await load(leaf, tmp_path, "one:1", "shared", "own")
    await load(leaf, tmp_path, "two:1", "shared", "other")
    await tag(leaf, "one:1", "also:1")
    removed = await remove(leaf, "also:1")
    assert list(removed.untagged) == ["docker.io/library/also:1"]
    assert list(removed.deleted) == []
    removed = await remove(leaf, "one:1")
    assert set(removed.deleted) == {
        one.id, one.target.digest, one.layers[1].blob.digest, one.layers[1].chain_id
    }  # fmt: skip
    assert removed.reclaimed_bytes > 3000
    await leaf.settled()
    assert await leaf.names() == ["two:1"]
    await remove(leaf, "two:1")
    await leaf.settled()
    assert leaf.disk() == set()


async def test_by_id_all_names_go_if_forced(leaf: ImagesLeaf, tmp_path: Path) -> None:
    image = await load(leaf, tmp_path, "one:1", "x")
    await tag(leaf, "one:1", "two:1")
    with pytest.raises(FailedPrecondition, match=r"several names \(one:1, two:1\)"):
        await remove(leaf, image.id[7:20])
    removed = await remove(leaf, image.id[7:20], force=True)
    assert list(removed.untagged) == ["docker.io/library/one:1", "docker.io/library/two:1"]
    assert await leaf.names() == []


async def test_an_image_in_use_is_removed_by_force_only_and_its_layers_stay(leaf: ImagesLeaf, tmp_path: Path) -> None:
    image = await load(leaf, tmp_path, "one:1", "x")
    made = await leaf.prepare("c1", image="one:1")
    await leaf.prepare("c2", image="one:1")
    with pytest.raises(FailedPrecondition, match="used by container c1 and 1 more"):
        await remove(leaf, "one:1")
    removed = await remove(leaf, "one:1", force=True)
    assert image.chain_id not in [name for name in removed.deleted if name != image.layers[0].blob.digest]
    with mounted(made.mounts, tmp_path / "m") as root:
        assert (root / "x").exists()
    assert len((await leaf.snapshots.Mounts(pb.SnapshotRequest(key="c1"))).mounts) == 1
    for key in ("c1", "c2"):
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key=key))
    await leaf.images.Prune(pb.PruneRequest())
    await leaf.settled()
    assert leaf.disk() == set()


async def test_the_name_a_container_was_made_under_is_in_use_too(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await load(leaf, tmp_path, "one:1", "x")
    await tag(leaf, "one:1", "two:1")
    await leaf.prepare("c", image="two:1")
    with pytest.raises(FailedPrecondition, match="used by container c"):
        await remove(leaf, "two:1")
    await remove(leaf, "one:1")
    assert await leaf.names() == ["two:1"]


async def test_prune_of_everything_spares_what_is_used(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await load(leaf, tmp_path, "used:1", "x")
    await load(leaf, tmp_path, "idle:1", "y")
    await leaf.prepare("c", image="used:1")
    assert list((await leaf.images.Prune(pb.PruneRequest())).untagged) == []
    pruned = await leaf.images.Prune(pb.PruneRequest(all=True))
    assert list(pruned.untagged) == ["docker.io/library/idle:1"]
    assert await leaf.names() == ["used:1"]


async def test_namespaces_do_not_see_each_other_and_share_content(leaf: ImagesLeaf, tmp_path: Path) -> None:
    mine = await load(leaf, tmp_path, "one:1", "x")
    with in_namespace("other"):
        assert await leaf.names() == []
        with pytest.raises(NotFound):
            await get(leaf, mine.id)
        with pytest.raises(NotFound):
            await remove(leaf, "one:1")
        theirs = await load(leaf, tmp_path, "one:1", "x")
        assert theirs.chain_id == mine.chain_id
        await leaf.prepare("c", image="one:1")
    assert sum(path.startswith("overlay/l/") for path in leaf.disk()) == 1
    assert [
        s.key for s in (await leaf.snapshots.List(pb.ListSnapshotsRequest(kind=pb.Snapshot.KIND_ACTIVE))).snapshots
    ] == []
    removed = await remove(leaf, "one:1")
    assert list(removed.deleted) == []
    with in_namespace("other"):
        assert await leaf.names() == ["one:1"]
        await remove(leaf, "one:1", force=True)
        await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c", must_exist=True))
    await leaf.images.Prune(pb.PruneRequest())
    await leaf.settled()
    assert leaf.disk() == set()


async def test_names_and_layers_outlive_the_daemon(tmp_path: Path) -> None:
    async with images_leaf(tmp_path / "images") as leaf:
        await load(leaf, tmp_path, "one:1", "x", "y")
        before = await leaf.prepare("c", image="one:1")
    async with images_leaf(tmp_path / "images") as leaf:
        assert await leaf.names() == ["one:1"]
        again = await leaf.prepare("c", image="one:1")
        assert again == before
        other = await leaf.prepare("d", image="one:1")
        assert other.mounts[0].options[1] != before.mounts[0].options[1]


async def test_events_tell_what_happened_and_nothing_else(leaf: ImagesLeaf, tmp_path: Path) -> None:
    await load(leaf, tmp_path, "one:1", "x")
    await tag(leaf, "one:1", "two:1")
    with pytest.raises(NotFound):
        await tag(leaf, "none:1", "three:1")
    await leaf.prepare("c", image="one:1")
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c"))
    await leaf.snapshots.Remove(pb.RemoveSnapshotRequest(key="c"))
    await remove(leaf, "two:1")
    with pytest.raises(InvalidArgument):
        await leaf.load(b"bad", name="bad:1")
    request = types.EventsRequest(no_follow=True)
    events = [event async for response in leaf.images.Events(request) for event in response.events]
    name = "docker.io/library/"
    assert [(event.topic, event.subject) for event in events] == [
        ("image.unpacked", (await get(leaf, "one:1")).id),
        ("image.imported", f"{name}one:1"),
        ("image.tagged", f"{name}two:1"),
        ("snapshot.prepared", "c"),
        ("snapshot.removed", "c"),
        ("image.removed", f"{name}two:1"),
    ]
    assert events[3].payload["image"] == "one:1"
    with in_namespace("other"):
        assert [response async for response in leaf.images.Events(request)] == []


async def test_a_layer_removed_by_hand_is_unpacked_again(tmp_path: Path) -> None:
    import shutil

    async with images_leaf(tmp_path / "images") as leaf:
        await load(leaf, tmp_path, "one:1", "x", "y")
    shutil.rmtree(tmp_path / "images/overlay/l")
    async with images_leaf(tmp_path / "images") as leaf:
        made = await leaf.prepare("c", image="one:1")
        with mounted(made.mounts, tmp_path / "m") as root:
            assert (root / "x").exists()
            assert (root / "y").exists()


async def test_a_blob_removed_by_hand_is_told_and_comes_back_with_the_image(tmp_path: Path) -> None:
    async with images_leaf(tmp_path / "images") as leaf:
        image = await load(leaf, tmp_path, "one:1", "x")
    (tmp_path / "images/blobs/sha256" / image.id[7:]).unlink()
    async with images_leaf(tmp_path / "images") as leaf:
        with pytest.raises(NotFound, match="import or pull its image again"):
            await get(leaf, "one:1")
        await load(leaf, tmp_path, "one:1", "x")
        assert (await get(leaf, "one:1")).id == image.id


async def test_a_blob_changed_on_disk_is_not_believed(tmp_path: Path) -> None:
    async with images_leaf(tmp_path / "images") as leaf:
        image = await load(leaf, tmp_path, "one:1", "x")
    path = tmp_path / "images/blobs/sha256" / image.id[7:]
    path.write_bytes(path.read_bytes().replace(b'"sh"', b'"su"'))
    async with images_leaf(tmp_path / "images") as leaf:
        with pytest.raises(InvalidArgument, match="was changed on disk"):
            await get(leaf, "one:1")


async def test_what_lies_around_without_a_row_is_removed_at_start(tmp_path: Path) -> None:
    root = tmp_path / "images"
    async with images_leaf(root) as leaf:
        await load(leaf, tmp_path, "one:1", "x")
        known = leaf.disk()
    for left in ("overlay/tmp/90/f", "overlay/l/91/f", "overlay/s/92/u/f", "ingest/abc/1", "ingest/def"):
        (root / left).parent.mkdir(parents=True, exist_ok=True)
        (root / left).write_text("x")
    (root / "blobs/sha256" / digest(b"")[7:]).write_bytes(b"")
    (root / "overlay/l/readme").write_text("not ours by its name")
    async with images_leaf(root) as leaf:
        await leaf.settled()
        assert leaf.disk() == known | {"overlay/l/readme"}
        made = await leaf.prepare("c", image="one:1")
        assert "/93/" in made.mounts[0].options[1], "numbers of what is still being removed are not given out again"


async def test_content_is_read_in_parts(leaf: ImagesLeaf) -> None:
    data = packed({"f": bytes(range(256)) * 9000})
    [image] = await leaf.load(data, name="x:1")
    blob = image.layers[0].blob.digest

    async def read(offset: int, length: int) -> bytes:
        request = pb.ReadBlobRequest(digest=blob, offset=offset, length=length)
        return b"".join([chunk.data async for chunk in leaf.content.Read(request)])

    assert (await leaf.content.Info(pb.BlobInfoRequest(digest=blob))).size_bytes == len(data)
    assert await read(0, 0) == data
    assert await read(1000, 1 << 20) == data[1000 : 1000 + (1 << 20)]
    assert await read(len(data) - 5, 100) == data[-5:]
    assert await read(len(data) + 5, 0) == b""
    with pytest.raises(InvalidArgument):
        await read(-1, 0)
    with pytest.raises(NotFound):
        await leaf.content.Info(pb.BlobInfoRequest(digest=digest(b"none")))


async def test_a_blob_in_use_is_not_deleted(leaf: ImagesLeaf, tmp_path: Path) -> None:
    image = await load(leaf, tmp_path, "one:1", "x")
    for blob, user in ((image.target.digest, "image docker.io/library/one:1"), (image.id, "manifest sha256:")):
        with pytest.raises(FailedPrecondition, match=f"is used by {user}"):
            await leaf.content.Delete(pb.DeleteBlobRequest(digest=blob))
    with in_namespace("other"):
        with pytest.raises(NotFound, match="there is no blob"):
            await leaf.content.Delete(pb.DeleteBlobRequest(digest=image.target.digest))
        await load(leaf, tmp_path, "two:1", "x")
        await remove(leaf, "two:1")
        with pytest.raises(FailedPrecondition, match="an image of another namespace"):
            await leaf.content.Delete(pb.DeleteBlobRequest(digest=image.target.digest))
