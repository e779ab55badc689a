"""Registries that do wrong: what is damaged is refused, what breaks is taken up again."""

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest
from support.faulty import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, Faulty, Handler, Seen, described, manifest_of
from support.faulty_images import big, fails, mirrored, small
from support.images import Entry, digest, image_config, layer
from support.images_leaf import ImagesLeaf
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.rpc.errors import (
    CorralError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)

pytestmark = needs("root", "overlayfs")


async def test_a_blob_with_other_content_is_refused(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = small(faulty)
    faulty.blobs[digest(made)] = made[:-1] + b"!"
    await fails(leaf, f"{faulty.host}/x:1", InvalidArgument, f"{digest(made)} with the digest .* nothing was stored")
    assert not [path for path in leaf.disk() if path.startswith("partial/")]
    faulty.blobs[digest(made)] = made
    await leaf.pull(f"{faulty.host}/x:1")


@pytest.mark.parametrize("size", [-1, 1])
async def test_a_blob_of_another_size_is_refused(leaf: ImagesLeaf, faulty: Faulty, size: int) -> None:
    made = small(faulty)
    faulty.blobs[digest(made)] = made[:size] if size < 0 else made + b"!"
    await fails(leaf, f"{faulty.host}/x:1", FailedPrecondition, f"bytes of blob {digest(made)} instead of {len(made)}")


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_damaged_blob_of_a_mirror_ends_the_pull_if_the_registry_does_not_give_it(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path, status: int
) -> None:
    made = small(mirror)
    mirror.blobs[digest(made)] = made[:-1] + b"!"

    def on(handler: Handler, _: Seen) -> bool:
        handler.answer(status)
        return True

    faulty.on = on
    async with asyncio.timeout(10):
        await fails(leaf, mirrored(tmp_path, faulty, mirror), InvalidArgument, "nothing was stored")
    assert len(mirror.of(digest(made))) == 2


@pytest.mark.parametrize("which", ["config", "layer"])
async def test_a_blob_of_a_size_that_none_has_is_refused(leaf: ImagesLeaf, faulty: Faulty, which: str) -> None:
    made = layer([Entry("f", b"x")])
    document = json.loads(manifest_of(faulty, [made], image_config([made])))
    blob = document["config"] if which == "config" else document["layers"][0]
    blob["size"] = (1 << 63) - 1 if which == "layer" else 1 << 30
    faulty.add("1", OCI_MANIFEST, json.dumps(document).encode())
    await fails(leaf, f"{faulty.host}/x:1", InvalidArgument, f"{blob['digest']} of {blob['size']} bytes; at most")
    assert not faulty.of("/blobs/")


async def test_a_blob_that_ends_early_is_taken_up_where_it_ended(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = small(faulty)
    cut = [len(made) // 3, 2 * len(made) // 3]

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) not in seen.path or not cut:
            return False
        end = cut.pop(0)
        start = int(seen.headers.get("range", "bytes=0-")[6:].partition("-")[0])
        headers = {"Content_Range": f"bytes {start}-{len(made) - 1}/{len(made)}"} if start else {}
        handler.answer(206 if start else 200, made[start:end], Content_Length=str(len(made) - start), **headers)
        handler.hang_up()
        return True

    faulty.on = on
    await leaf.pull(f"{faulty.host}/x:1")
    starts = [seen.headers.get("range") for seen in faulty.of(digest(made))]
    assert starts == [None, f"bytes={len(made) // 3}-{len(made) - 1}", f"bytes={2 * len(made) // 3}-{len(made) - 1}"]


async def test_a_blob_that_never_comes_is_given_up_after_some_tries(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = small(faulty)

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) in seen.path:
            handler.answer(200, b"", Content_Length=str(len(made)))
            handler.hang_up()
        return digest(made) in seen.path

    faulty.on = on
    await fails(leaf, f"{faulty.host}/x:1", Unavailable, f"for blob {digest(made)}")
    assert len(faulty.of(digest(made))) == 5


async def test_a_registry_without_ranges_is_taken_as_it_is(leaf: ImagesLeaf, faulty: Faulty) -> None:
    """Large, cut once in the middle: what came is not fetched into its place again."""
    made = big(faulty)
    cut = [len(made) // 2]

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) not in seen.path:
            return False
        end = cut.pop() if cut else len(made)
        handler.answer(200, made[:end], Content_Length=str(len(made)))
        if end < len(made):
            handler.hang_up()
        return True

    faulty.on = on
    await leaf.pull(f"{faulty.host}/x:1")
    assert len(faulty.of(digest(made))) == 2


async def test_a_registry_that_refuses_ranges_is_asked_for_the_whole(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = big(faulty)
    faulty.on = lambda handler, seen: "range" in seen.headers and handler.answer(416) is None
    await leaf.pull(f"{faulty.host}/x:1")
    assert [("range" in seen.headers) for seen in faulty.of(digest(made))] == [True, False]


async def test_a_registry_that_does_not_know_head_is_asked_for_the_manifest(leaf: ImagesLeaf, faulty: Faulty) -> None:
    small(faulty)
    image = await leaf.pull(f"{faulty.host}/x:1")
    faulty.on = lambda handler, seen: seen.method == "HEAD" and handler.answer(405) is None
    assert (await leaf.pull(f"{faulty.host}/x:1")).target == image.target
    assert len(faulty.of("/manifests/", "HEAD")) == 1


async def test_a_range_that_begins_elsewhere_is_refused(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = big(faulty)

    def on(handler: Handler, seen: Seen) -> bool:
        if "range" not in seen.headers:
            return False
        handler.answer(206, made[1:1001], Content_Range=f"bytes 1-1000/{len(made)}")
        return True

    faulty.on = on
    await fails(leaf, f"{faulty.host}/x:1", FailedPrecondition, "another part")


async def test_large_blobs_come_in_parts_side_by_side(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = big(faulty)
    together = threading.Barrier(2, timeout=20)

    def on(handler: Handler, seen: Seen) -> bool:
        if "range" in seen.headers and not seen.headers["range"].startswith("bytes=0-"):
            together.wait()  # the second and third part meet here, or nobody passes
        return False

    faulty.on = on
    await leaf.pull(f"{faulty.host}/x:1")
    ranges = sorted(seen.headers["range"] for seen in faulty.of(digest(made)))
    part = 16 << 20
    assert ranges == [f"bytes=0-{part - 1}", f"bytes={part}-{2 * part - 1}", f"bytes={2 * part}-{len(made) - 1}"]


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
async def test_what_passes_is_asked_for_again(leaf: ImagesLeaf, faulty: Faulty, status: int) -> None:
    small(faulty)
    left = {"manifests": 2, "blobs": 2}

    def on(handler: Handler, seen: Seen) -> bool:
        kind = seen.path.split("/")[-2]
        if not left.get(kind):
            return False
        left[kind] -= 1
        handler.answer(status)
        return True

    faulty.on = on
    await leaf.pull(f"{faulty.host}/x:1")
    assert set(left.values()) == {0}


async def test_retry_after_is_waited_for(leaf: ImagesLeaf, faulty: Faulty) -> None:
    small(faulty)
    refused: list[float] = []

    def on(handler: Handler, seen: Seen) -> bool:
        if refused:
            return False
        refused.append(time.monotonic())
        handler.answer(429, Retry_After="2")
        return True

    faulty.on = on
    await leaf.pull(f"{faulty.host}/x:1")
    assert time.monotonic() - refused[0] >= 2


async def test_too_long_a_wait_is_told_instead_of_waited_for(leaf: ImagesLeaf, faulty: Faulty) -> None:
    small(faulty)
    body = json.dumps({"errors": [{"code": "TOOMANYREQUESTS", "message": "limit\u001b[31m reached"}]}).encode()
    faulty.on = lambda handler, seen: handler.answer(429, body, Retry_After="3600") is None
    began = time.monotonic()
    e = await fails(leaf, f"{faulty.host}/x:1", ResourceExhausted, "limit .*reached.*3600 s")
    assert time.monotonic() - began < 5
    assert "\x1b" not in str(e)
    assert e.reason == "TOO_MANY_REQUESTS"


async def test_denied_and_unknown_images_are_told_apart_by_what_helps(leaf: ImagesLeaf, faulty: Faulty) -> None:
    faulty.on = lambda handler, seen: handler.answer(401, WWW_Authenticate='Basic realm="x"') is None
    await fails(leaf, f"{faulty.host}/x:1", PermissionDenied, f"corral login {faulty.host}")
    faulty.on = lambda handler, seen: handler.answer(403) is None
    await fails(leaf, f"{faulty.host}/x:1", PermissionDenied, "denies")
    faulty.on = lambda handler, seen: False
    await fails(leaf, f"{faulty.host}/x:1", NotFound, "no such thing")
    assert len(faulty.of("manifests")) == 3, "none of it is worth another try"


async def test_a_manifest_with_another_digest_is_refused(leaf: ImagesLeaf, faulty: Faulty) -> None:
    small(faulty)
    media_type, data = faulty.manifests["1"]

    def on(handler: Handler, seen: Seen) -> bool:
        if "/manifests/" not in seen.path:
            return False
        handler.answer(200, data + b" ", Content_Type=media_type, Docker_Content_Digest=digest(data))
        return True

    faulty.on = on
    await fails(leaf, f"{faulty.host}/x:1", FailedPrecondition, f"instead of {digest(data)}")
    await fails(leaf, f"{faulty.host}/x@{digest(data)}", FailedPrecondition, f"instead of {digest(data)}")


async def test_a_manifest_without_end_is_cut_off(leaf: ImagesLeaf, faulty: Faulty) -> None:
    sent = [0]

    def on(handler: Handler, seen: Seen) -> bool:
        handler.answer(200, Content_Type=OCI_MANIFEST, Content_Length=str(1 << 40))
        chunk = b" " * (1 << 20)
        while sent[0] < 200 << 20:
            handler.wfile.write(chunk)
            sent[0] += len(chunk)
        return True

    faulty.on = on
    await fails(leaf, f"{faulty.host}/x:1", FailedPrecondition, "more than 4 MiB")
    assert sent[0] < 100 << 20


@pytest.mark.parametrize(
    ("document", "match"),
    [
        (b"[]", "not a JSON object"),
        (b'{"schemaVersion": 1}', "schemaVersion is not 2"),
        (b'{"schemaVersion": 2, "manifests": [], "layers": []}', "both an index and a manifest"),
        (b'{"schemaVersion": 2, "manifests": []}', "has nothing for"),
        (b'{"schemaVersion": 2, "config": {"digest": "../../etc/passwd", "size": 1}, "layers": []}', "sha256:<64"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
    ],
)
async def test_documents_that_are_none_are_refused(
    leaf: ImagesLeaf, faulty: Faulty, document: bytes, match: str
) -> None:
    faulty.add("1", "application/json", document)
    await fails(leaf, f"{faulty.host}/x:1", CorralError, match)


async def test_an_artifact_is_refused_by_what_it_is(leaf: ImagesLeaf, faulty: Faulty) -> None:
    chart = b"a helm chart"
    config = described("application/vnd.cncf.helm.config.v1+json", b"{}")
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config,
                "layers": [described("application/vnd.cncf.helm.chart.content.v1.tar+gzip", chart)]}  # fmt: skip
    faulty.add("1", OCI_MANIFEST, json.dumps(manifest).encode())
    e = await fails(leaf, f"{faulty.host}/x:1", InvalidArgument, "helm.config")
    assert e.reason == "NOT_AN_IMAGE"
    assert not faulty.of("/blobs/")


async def test_a_config_that_does_not_fit_its_layers_is_refused_before_they_come(
    leaf: ImagesLeaf, faulty: Faulty
) -> None:
    one, two = layer([Entry("a", b"1")]), layer([Entry("b", b"2")])
    config = image_config([one])
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described(OCI_CONFIG, config),
                "layers": [described(OCI_LAYER, one), described(OCI_LAYER, two)]}  # fmt: skip
    faulty.blobs[digest(config)] = config
    faulty.add("1", OCI_MANIFEST, json.dumps(manifest).encode())
    await fails(leaf, f"{faulty.host}/x:1", InvalidArgument, "2 layers, but its config tells of 1")
    assert len(faulty.of("/blobs/")) == 1


async def test_an_index_of_indexes_of_indexes_ends_somewhere(leaf: ImagesLeaf, faulty: Faulty) -> None:
    small(faulty)
    entry = described(OCI_MANIFEST, faulty.manifests["1"][1], platform={"os": "linux", "architecture": "amd64"})
    for depth in range(8):
        data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode()
        faulty.add(str(depth + 2), OCI_INDEX, data)
        entry = described(OCI_INDEX, data, platform={"os": "linux", "architecture": "amd64"})
    await fails(leaf, f"{faulty.host}/x:9", InvalidArgument, "nested more than 4 deep")


async def test_indexes_that_name_no_platform_are_looked_into(leaf: ImagesLeaf, faulty: Faulty) -> None:
    small(faulty)
    inner = [
        {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [described(OCI_MANIFEST, data, platform=platform)]}
        for data, platform in (
            (b"{}", {"os": "linux", "architecture": "s390x"}),
            (faulty.manifests["1"][1], {"os": "linux", "architecture": "amd64"}),
        )
    ]
    for document in inner:
        faulty.add("inner", OCI_INDEX, json.dumps(document).encode())
    outer = [described(OCI_INDEX, json.dumps(document).encode()) for document in inner]
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": outer}).encode()
    faulty.add("2", OCI_INDEX, index)
    amd64 = types_pb2.Platform(os="linux", architecture="amd64")
    image = await leaf.pull(f"{faulty.host}/x:2", platform=amd64)
    assert (image.target.digest, image.manifest.digest) == (digest(index), digest(faulty.manifests["1"][1]))
    arm = types_pb2.Platform(os="linux", architecture="arm")
    with pytest.raises(NotFound, match="it offers linux/amd64, linux/s390x"):
        await leaf.pull(f"{faulty.host}/x:2", platform=arm)


async def test_a_list_of_referrers_without_end_is_given_up(leaf: ImagesLeaf, faulty: Faulty) -> None:
    """Pages after pages, full or empty."""
    small(faulty)
    entries = [described(OCI_MANIFEST, str(n).encode()) for n in range(1000)]

    for manifests in (entries, []):
        page = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()

        def on(handler: Handler, seen: Seen, page: bytes = page) -> bool:
            if "/referrers/" in seen.path:
                handler.answer(200, page, Content_Type=OCI_INDEX, Link=f'<{seen.path}>; rel="next"')
            return "/referrers/" in seen.path

        faulty.on = on
        faulty.seen.clear()
        with pytest.raises(FailedPrecondition, match="without end"):
            await leaf.images.Referrers(pb.ReferrersRequest(name=f"{faulty.host}/x:1"))
        assert len(faulty.of("/referrers/")) <= 2 * 11, "twice, as it may also be one with TLS that is not there now"
