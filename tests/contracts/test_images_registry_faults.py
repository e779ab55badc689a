"""Registries that do wrong: what is damaged is refused, what breaks is taken up again, secrets stay where they are."""

import asyncio
import json
import os
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.faulty import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Faulty,
    Handler,
    Seen,
    described,
    faulty_registry,
    manifest_of,
)
from support.images import Entry, digest, image_config, layer
from support.images_leaf import ImagesLeaf, images_leaf
from support.registry import Authority, write_hosts
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

BIG = 40 << 20
SECRETS = ("s3cret-password", "Basic ", "signature=", "t0ken")


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with faulty_registry() as made:
        yield made


@pytest.fixture
def mirror() -> Iterator[Faulty]:
    with faulty_registry() as made:
        yield made


@pytest.fixture
async def leaf(tmp_path: Path) -> AsyncIterator[ImagesLeaf]:
    async with images_leaf(tmp_path / "images", certs=tmp_path / "certs.d") as made:
        yield made


def small(faulty: Faulty, what: bytes = b"x") -> bytes:
    """An image x:1 of one layer, which is returned."""
    made = layer([Entry("f", what * 5000)])
    faulty.add_image("1", [made])
    return made


def big(faulty: Faulty) -> bytes:
    """One whose layer is fetched in parts."""
    made = layer([Entry("f", bytes(range(256)) * (BIG >> 8))])
    faulty.add_image("1", [made])
    return made


async def fails(leaf: ImagesLeaf, name: str, kind: type[CorralError], match: str, **request: object) -> CorralError:
    """The error of a pull, one sentence; nothing is to be seen of the image."""
    with pytest.raises(kind, match=match) as caught:
        await leaf.pull(name, **request)
    assert "\n" not in str(caught.value)
    assert await leaf.names() == []
    await leaf.settled()
    assert not [path for path in leaf.disk() if path.startswith(("overlay/", "ingest/"))]
    return caught.value


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come about")


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


# Where secrets go


async def login_wanted(faulty: Faulty) -> pb.RegistryAuth:
    """From now on it wants basic credentials."""
    inner = faulty.on

    def on(handler: Handler, seen: Seen) -> bool:
        if "authorization" not in seen.headers:
            handler.answer(401, WWW_Authenticate='Basic realm="x"')
            return True
        return inner(handler, seen)

    faulty.on = on
    return pb.RegistryAuth(username="alice", password=SECRETS[0])


async def test_a_redirect_to_another_host_takes_no_credentials_along(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = small(faulty)
    mirror.blobs = faulty.blobs
    write_hosts(tmp_path / "certs.d", faulty.host, f'server = "http://{faulty.host}"\n[header]\nX-Own = "t0ken"\n')

    def on(handler: Handler, seen: Seen) -> bool:
        if "/blobs/" not in seen.path:
            return False
        handler.answer(307, Location=f"http://{mirror.host}{seen.path}?signature=abc")
        return True

    faulty.on = on
    auth = await login_wanted(faulty)
    await leaf.pull(f"{faulty.host}/x:1", auth=auth)
    assert all("authorization" in seen.headers and "x-own" in seen.headers for seen in faulty.of("/blobs/"))
    elsewhere = mirror.of("/blobs/")
    assert len(elsewhere) == 2
    assert not [seen for seen in elsewhere if "authorization" in seen.headers or "x-own" in seen.headers]
    mirror.blobs = {}
    mirror.on = lambda handler, seen: handler.answer(404) is None
    await leaf.images.Remove(pb.RemoveImageRequest(name=f"{faulty.host}/x:1"))
    faulty.add_image("2", [layer([Entry("other", b"1")])])
    with pytest.raises(NotFound) as caught:
        await leaf.pull(f"{faulty.host}/x:2", auth=auth)
    told = str(caught.value) + str(caught.value.metadata) + capfd.readouterr().out
    assert not [secret for secret in SECRETS if secret in told]
    assert digest(made)


async def test_a_redirect_from_https_to_http_is_not_followed(tmp_path: Path, mirror: Faulty) -> None:
    authority = Authority.make(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    with faulty_registry(tls=context) as secure:
        small(secure)
        mirror.blobs = secure.blobs

        def on(handler: Handler, seen: Seen) -> bool:
            if "/blobs/" in seen.path:
                handler.answer(307, Location=f"http://{mirror.host}{seen.path}")
            return "/blobs/" in seen.path

        secure.on = on
        hosts = f'server = "https://{secure.host}"\nca = "{authority.ca}"\n'
        write_hosts(tmp_path / "certs.d", secure.host, hosts)
        async with images_leaf(tmp_path / "images", certs=tmp_path / "certs.d") as leaf:
            await fails(leaf, f"{secure.host}/x:1", FailedPrecondition, "not encrypted")
            assert not mirror.seen


@pytest.mark.parametrize("location", ["file:///etc/passwd", "gopher://x/", "http://", "//", "http://[::1/"])
async def test_a_redirect_to_what_is_no_web_address_is_not_followed(
    leaf: ImagesLeaf, faulty: Faulty, location: str
) -> None:
    small(faulty)

    def on(handler: Handler, seen: Seen) -> bool:
        handler.answer(302, Location=location)
        return True

    faulty.on = on
    await fails(leaf, f"{faulty.host}/x:1", CorralError, "redirects|no address")


async def test_redirects_in_a_circle_end(leaf: ImagesLeaf, faulty: Faulty) -> None:
    faulty.on = lambda handler, seen: handler.answer(302, Location=seen.path) is None
    await fails(leaf, f"{faulty.host}/x:1", FailedPrecondition, "redirects more than")


# Mirrors


def mirrored(tmp_path: Path, faulty: Faulty, mirror: Faulty, capabilities: str = '["pull", "resolve"]') -> str:
    """An image's name in a registry that `mirror` stands before."""
    write_hosts(
        tmp_path / "certs.d",
        "r.example",
        f'server = "http://{faulty.host}"\n[host."http://{mirror.host}"]\ncapabilities = {capabilities}\n',
    )
    return "r.example/x:1"


async def test_a_mirror_is_asked_first_and_told_for_whom(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    small(mirror)
    image = await leaf.pull(name, auth=pb.RegistryAuth(username="alice", password=SECRETS[0]))
    assert image.name == name
    assert not faulty.seen
    assert mirror.seen
    assert all(seen.path.endswith("?ns=r.example") for seen in mirror.seen)


async def test_a_mirror_never_gets_the_credentials(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    small(faulty)
    mirror.on = lambda handler, seen: handler.answer(401, WWW_Authenticate='Basic realm="give me"') is None
    auth = await login_wanted(faulty)
    await leaf.pull(name, auth=auth)
    assert mirror.seen
    assert not [seen for seen in mirror.seen if "authorization" in seen.headers]
    assert [seen for seen in faulty.seen if "authorization" in seen.headers]


@pytest.mark.parametrize("status", [404, 403, 429, 500, 503, 0])
async def test_a_mirror_that_fails_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path, status: int
) -> None:
    """0: the connection breaks."""
    name = mirrored(tmp_path, faulty, mirror)
    small(faulty)
    mirror.on = lambda handler, seen: (handler.answer(status) if status else handler.hang_up()) is None
    await leaf.pull(name)
    assert mirror.seen


async def test_a_mirror_that_is_not_there_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, Faulty(port=1))
    small(faulty)
    began = time.monotonic()
    await leaf.pull(name)
    assert time.monotonic() - began < 5


async def test_a_mirror_that_breaks_in_the_middle_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    made = small(faulty)
    small(mirror)

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) in seen.path:
            handler.answer(200, made[: len(made) // 2], Content_Length=str(len(made)))
            handler.hang_up()
        return digest(made) in seen.path

    mirror.on = on
    await leaf.pull(name)
    [rest] = faulty.of(digest(made))
    assert rest.headers["range"] == f"bytes={len(made) // 2}-{len(made) - 1}"


async def test_a_mirror_that_gives_other_content_is_left_for_the_registry(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    made = small(faulty)
    small(mirror)
    mirror.blobs[digest(made)] = made[:-1] + b"!"
    await leaf.pull(name)
    assert len(faulty.of(digest(made))) == 1


async def test_a_mirror_that_may_not_resolve_is_not_asked_what_a_tag_means(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, mirror, '["pull"]')
    small(faulty, b"the real one")
    small(mirror, b"an old one")
    mirror.manifests |= {key: value for key, value in faulty.manifests.items() if key != "1"}
    mirror.blobs |= faulty.blobs
    image = await leaf.pull(name)
    assert image.target.digest == digest(faulty.manifests["1"][1])
    assert len(faulty.of("/manifests/")) == 1
    assert not faulty.of("/blobs/")
    assert not mirror.of("/manifests/1")


async def test_the_registrys_own_answer_is_told_not_the_mirrors(
    leaf: ImagesLeaf, faulty: Faulty, tmp_path: Path
) -> None:
    name = mirrored(tmp_path, faulty, Faulty(port=1))
    await fails(leaf, name, NotFound, "registry r.example has no image r.example/x:1")


async def test_only_the_registry_is_pushed_to(leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path) -> None:
    name = mirrored(tmp_path, faulty, mirror)
    small(faulty)
    await leaf.pull(f"{faulty.host}/x:1")
    with pytest.raises(CorralError):
        await leaf.push(f"{faulty.host}/x:1", name)
    assert not mirror.seen
    write_hosts(tmp_path / "certs.d", "r.example", f'server = "http://{faulty.host}"\ncapabilities = ["pull"]\n')
    with pytest.raises(FailedPrecondition, match=r"hosts\.toml"):
        await leaf.push(f"{faulty.host}/x:1", name)


async def test_settings_that_are_wrong_are_told_at_the_pull(leaf: ImagesLeaf, tmp_path: Path) -> None:
    write_hosts(tmp_path / "certs.d", "r.example", 'server = "https://r.example"\nca = "missing.crt"\n')
    with pytest.raises(FailedPrecondition, match=r"missing\.crt"):
        await leaf.pull("r.example/x:1")


async def test_a_proxy_of_the_environment_is_used_but_not_where_it_shall_not(
    leaf: ImagesLeaf, faulty: Faulty, mirror: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:s3cret-password@{mirror.host}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_hosts(tmp_path / "certs.d", "r.example", 'server = "http://r.example"\n')

    def on(handler: Handler, seen: Seen) -> bool:
        if seen.path.startswith("http://r.example/"):
            handler.content(replace(seen, path=seen.path.removeprefix("http://r.example")))
        return True

    small(mirror)
    mirror.on = on
    await leaf.pull("r.example/x:1")
    assert all(seen.headers["proxy-authorization"].startswith("Basic ") for seen in mirror.seen)
    count = len(mirror.seen)
    small(faulty)
    await leaf.pull(f"{faulty.host}/x:1")
    assert len(mirror.seen) == count


# Two at a time, and those that go away


async def test_two_pulls_of_the_same_blob_share_one_download(leaf: ImagesLeaf, faulty: Faulty) -> None:
    made = big(faulty)
    arrived = threading.Event()

    def on(handler: Handler, seen: Seen) -> bool:
        if digest(made) in seen.path:
            arrived.wait(20)
        return False

    faulty.on = on
    pulls = [asyncio.ensure_future(leaf.pull(f"{faulty.host}/{name}:1")) for name in ("x", "y")]
    await until(lambda: {"x", "y"} <= {seen.path.split("/")[2] for seen in faulty.of("/manifests/")})
    await asyncio.sleep(0.2)
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
    await until(lambda: bool(faulty.of("/y/manifests/")))
    await asyncio.sleep(0.2)
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
    downloads._under_way[descriptor.digest] = _Shared(task)
    task.add_done_callback(come)
    task.add_done_callback(lambda _: downloads._under_way.pop(descriptor.digest))
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
        async with leaf.service._partials.opened(descriptor.digest, len(made)) as partial:
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
