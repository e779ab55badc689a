"""Pushes to registries that break, that want no chunks, that know referrers and that do not."""

import asyncio
import json
import re
import ssl
import threading
from collections.abc import Iterator
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
)
from support.images import Entry, digest, image_config, layer, write_oci_archive
from support.images_leaf import ImagesLeaf, images_leaf
from support.registry import Authority, write_hosts
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.images.registry import upload
from corral.rpc.errors import CorralError, FailedPrecondition, Unavailable

pytestmark = needs("root", "overlayfs")

_RANGE = re.compile(r"(\d+)-(\d+)")
MIB = 1 << 20


class Sink:
    """Takes uploads, as docker-registry does, and keeps them; `meddle` may do otherwise."""

    def __init__(self, faulty: Faulty) -> None:
        self.faulty = faulty
        self.sessions: dict[str, bytearray] = {}
        self.lock = threading.Lock()
        self.subject = True
        faulty.on = self.on

    def meddle(self, handler: Handler, seen: Seen) -> bool:
        return False

    def on(self, handler: Handler, seen: Seen) -> bool:
        if self.meddle(handler, seen):
            return True
        path, _, query = seen.path.partition("?")
        if path == "/v2/":
            handler.answer(200)
        elif seen.method == "POST":
            name = f"/session/{len(self.sessions)}"
            self.sessions[name] = bytearray()
            handler.answer(202, Location=name, Range="0-0")
        elif path in self.sessions:
            self.session(handler, seen, path, query)
        elif seen.method == "PUT" and "/manifests/" in path:
            self.manifest(handler, seen, path.rpartition("/")[2])
        else:
            return False
        return True

    def session(self, handler: Handler, seen: Seen, path: str, query: str) -> None:
        held = self.sessions[path]
        if seen.method == "PATCH":
            match = _RANGE.fullmatch(seen.headers["content-range"])
            assert match
            assert (int(match[1]), int(match[2]) + 1 - int(match[1])) == (len(held), len(seen.body))
        held += seen.body
        where = f"0-{max(len(held) - 1, 0)}"
        if seen.method != "PUT":
            handler.answer(202 if seen.method == "PATCH" else 204, Location=path, Range=where)
        elif f"digest={digest(bytes(held)).replace(':', '%3A')}" in query:
            self.faulty.blobs[digest(bytes(held))] = bytes(held)
            handler.answer(201)
        else:
            handler.answer(400, b'{"errors": [{"code": "DIGEST_INVALID", "message": "not what was said"}]}')

    def manifest(self, handler: Handler, seen: Seen, name: str) -> None:
        document = json.loads(seen.body)
        children = [entry["digest"] for entry in document.get("layers", [])]
        assert all(child in self.faulty.blobs for child in children), "content comes before what refers to it"
        for each in (name, digest(seen.body)):
            self.faulty.manifests[each] = (seen.headers["content-type"], seen.body)
        subject = document.get("subject")
        more = {"OCI_Subject": subject["digest"]} if subject and self.subject else {}
        handler.answer(201, Docker_Content_Digest=digest(seen.body), **more)


@pytest.fixture
def sink() -> Iterator[Sink]:
    with faulty_registry() as faulty:
        yield Sink(faulty)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size that tests can afford."""
    monkeypatch.setattr(upload, "CHUNKED_BYTES", 2 * MIB)
    monkeypatch.setattr(upload, "CHUNK_BYTES", MIB)


async def load(leaf: ImagesLeaf, tmp_path: Path, size: int = 5 * MIB) -> bytes:
    """An image x:1; returns its layer."""
    made = layer([Entry("f", (bytes(range(256)) * (size // 256)))])
    await leaf.load(write_oci_archive(tmp_path / "x.tar", "x:1", [made], image_config([made]), compress=False))
    return made


async def test_a_small_blob_goes_at_once(leaf: ImagesLeaf, sink: Sink, tmp_path: Path) -> None:
    made = await load(leaf, tmp_path, MIB)
    pushed = await leaf.push("x:1", f"{sink.faulty.host}/x:1")
    assert digest(sink.faulty.manifests["1"][1]) == pushed
    assert sink.faulty.blobs[digest(made)] == made
    assert not sink.faulty.of("", "PATCH")
    assert sink.faulty.seen[-1].path.endswith("/manifests/1"), "the name comes last"


@pytest.mark.usefixtures("chunks")
async def test_a_large_blob_goes_in_chunks(leaf: ImagesLeaf, sink: Sink, tmp_path: Path) -> None:
    made = await load(leaf, tmp_path)
    await leaf.push("x:1", f"{sink.faulty.host}/x:1")
    assert sink.faulty.blobs[digest(made)] == made
    sizes = [len(seen.body) for seen in sink.faulty.of("", "PATCH")]
    assert sizes[:-1] == [MIB] * (len(sizes) - 1)


@pytest.mark.usefixtures("chunks")
async def test_chunks_are_as_large_as_the_registry_wants_them(leaf: ImagesLeaf, sink: Sink, tmp_path: Path) -> None:
    def meddle(handler: Handler, seen: Seen) -> bool:
        if seen.method != "POST":
            return False
        sink.sessions["/session/own"] = bytearray()
        handler.answer(202, Location="/session/own", OCI_Chunk_Min_Length=str(2 * MIB))
        return True

    made = await load(leaf, tmp_path)
    sink.meddle = meddle  # type: ignore[method-assign]
    # The config would end in the same session as the layer; it is there already.
    sink.faulty.blobs[digest(image_config([made]))] = image_config([made])
    await leaf.push("x:1", f"{sink.faulty.host}/x:1")
    assert [len(seen.body) for seen in sink.faulty.of("", "PATCH")][:-1] == [2 * MIB] * 2


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("kept", [0, 300_000], ids=["nothing kept", "a part kept"])
async def test_a_chunk_that_breaks_goes_on_where_the_registry_is(
    leaf: ImagesLeaf, sink: Sink, tmp_path: Path, kept: int
) -> None:
    made = await load(leaf, tmp_path)
    broken: list[int] = []

    def meddle(handler: Handler, seen: Seen) -> bool:
        if seen.method != "PATCH" or broken or not sink.sessions[seen.path]:
            return False
        sink.sessions[seen.path] += seen.body[:kept]
        broken.append(len(sink.sessions[seen.path]))
        handler.hang_up()
        return True

    sink.meddle = meddle  # type: ignore[method-assign]
    await leaf.push("x:1", f"{sink.faulty.host}/x:1")
    assert sink.faulty.blobs[digest(made)] == made
    starts = [int(seen.headers["content-range"].partition("-")[0]) for seen in sink.faulty.of("", "PATCH")]
    assert broken[0] in starts
    sent = sum(len(seen.body) for seen in sink.faulty.of("", "PATCH"))
    assert sent <= len(made) + MIB


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("loses", [False, True])
async def test_an_upload_that_comes_no_further_is_given_up(
    leaf: ImagesLeaf, sink: Sink, tmp_path: Path, loses: bool
) -> None:
    """Every chunk is accepted, but the registry has only the first of them; or takes each second, and loses it."""
    await load(leaf, tmp_path)
    patches: list[int] = []

    def meddle(handler: Handler, seen: Seen) -> bool:
        if "/session/" not in seen.path or seen.method == "PUT":
            return False
        if seen.method == "PATCH":
            patches.append(1)
        has = 2 * MIB if loses and seen.method == "PATCH" and len(patches) % 2 else MIB
        handler.answer(202, Location=seen.path, Range=f"0-{has - 1}")
        return True

    sink.meddle = meddle  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="blob"):
        async with asyncio.timeout(20):
            await leaf.push("x:1", f"{sink.faulty.host}/x:1")
    assert len(patches) < 15


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("status", [404, 405, 413, 416])
async def test_a_registry_that_wants_no_chunks_gets_it_whole(
    leaf: ImagesLeaf, sink: Sink, tmp_path: Path, status: int
) -> None:
    made = await load(leaf, tmp_path)
    sink.meddle = lambda handler, seen: seen.method == "PATCH" and handler.answer(status) is None  # type: ignore[method-assign]
    await leaf.push("x:1", f"{sink.faulty.host}/x:1")
    assert sink.faulty.blobs[digest(made)] == made
    assert len(sink.faulty.of("", "PATCH")) == 1


@pytest.mark.parametrize("moment", ["PUT", "POST", "HEAD"])
async def test_what_fails_once_is_done_again(leaf: ImagesLeaf, sink: Sink, tmp_path: Path, moment: str) -> None:
    made = await load(leaf, tmp_path, MIB)
    failed: list[str] = []

    def meddle(handler: Handler, seen: Seen) -> bool:
        if seen.method != moment or len(failed) >= 2:
            return False
        failed.append(seen.path)
        if len(failed) == 1:
            handler.answer(503)
        else:
            handler.hang_up()
        return True

    sink.meddle = meddle  # type: ignore[method-assign]
    await leaf.push("x:1", f"{sink.faulty.host}/x:1")
    assert sink.faulty.blobs[digest(made)] == made
    assert len(failed) == 2


async def test_an_upload_that_never_works_is_given_up_and_no_name_is_left(
    leaf: ImagesLeaf, sink: Sink, tmp_path: Path
) -> None:
    await load(leaf, tmp_path, MIB)
    sink.meddle = lambda handler, seen: "/session/" in seen.path and handler.answer(500) is None  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="failed over blob"):
        await leaf.push("x:1", f"{sink.faulty.host}/x:1")
    assert not sink.faulty.manifests


async def test_a_registry_that_stores_something_else_is_not_believed(
    leaf: ImagesLeaf, sink: Sink, tmp_path: Path
) -> None:
    await load(leaf, tmp_path, MIB)

    def meddle(handler: Handler, seen: Seen) -> bool:
        if seen.method != "PUT" or "/manifests/" not in seen.path:
            return False
        handler.answer(201, Docker_Content_Digest=digest(b"other"))
        return True

    sink.meddle = meddle  # type: ignore[method-assign]
    with pytest.raises(FailedPrecondition, match="stored the manifest as"):
        await leaf.push("x:1", f"{sink.faulty.host}/x:1")


async def test_what_the_registry_says_against_an_image_is_told(leaf: ImagesLeaf, sink: Sink, tmp_path: Path) -> None:
    await load(leaf, tmp_path, MIB)
    said = json.dumps({"errors": [{"code": "DENIED", "message": "quota of the project is used up"}]}).encode()
    sink.meddle = lambda handler, seen: "/manifests/" in seen.path and handler.answer(400, said) is None  # type: ignore[method-assign]
    with pytest.raises(CorralError, match="quota of the project is used up"):
        await leaf.push("x:1", f"{sink.faulty.host}/x:1")


async def test_an_upload_that_goes_to_another_host_takes_no_credentials_there(
    leaf: ImagesLeaf, sink: Sink, tmp_path: Path
) -> None:
    made = await load(leaf, tmp_path, MIB)
    with faulty_registry() as elsewhere:
        other = Sink(elsewhere)

        def meddle(handler: Handler, seen: Seen) -> bool:
            if "authorization" not in seen.headers:
                handler.answer(401, WWW_Authenticate='Basic realm="x"')
                return True
            if seen.method == "POST":
                name = f"/session/{len(other.sessions)}"
                other.sessions[name] = bytearray()
                handler.answer(202, Location=f"http://{elsewhere.host}{name}?state=abc")
                return True
            return False

        sink.meddle = meddle  # type: ignore[method-assign]
        sink.faulty.blobs = elsewhere.blobs
        auth = pb.RegistryAuth(username="alice", password="secret")
        await leaf.push("x:1", f"{sink.faulty.host}/x:1", auth=auth)
        assert elsewhere.blobs[digest(made)] == made
        assert not [seen for seen in elsewhere.seen if "authorization" in seen.headers]


@pytest.mark.parametrize("same", [True, False], ids=["same host", "another host"])
async def test_an_upload_of_an_encrypted_registry_stays_encrypted(tmp_path: Path, same: bool) -> None:
    """Behind a proxy, many give addresses as if they spoke plain HTTP."""
    authority = Authority.make(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    with faulty_registry(tls=context) as secure, faulty_registry() as elsewhere:
        sink = Sink(secure)

        def meddle(handler: Handler, seen: Seen) -> bool:
            if seen.method != "POST":
                return False
            name = f"/session/{len(sink.sessions)}"
            sink.sessions[name] = bytearray()
            handler.answer(202, Location=f"http://{secure.host if same else elsewhere.host}{name}")
            return True

        sink.meddle = meddle  # type: ignore[method-assign]
        write_hosts(tmp_path / "certs.d", "r.example", f'server = "https://{secure.host}"\nca = "{authority.ca}"\n')
        async with images_leaf(tmp_path / "images", certs=tmp_path / "certs.d") as leaf:
            made = await load(leaf, tmp_path, MIB)
            if same:
                await leaf.push("x:1", "r.example/x:1")
                assert secure.blobs[digest(made)] == made
            else:
                with pytest.raises(FailedPrecondition, match="not encrypted"):
                    await leaf.push("x:1", "r.example/x:1")
            assert not elsewhere.seen


# Referrers


def artifact(faulty: Faulty, subject: dict[str, object], kind: str) -> dict[str, object]:
    """A signature, say, that refers to the subject; its descriptor as in a list of referrers."""
    empty = b"{}"
    manifest = {
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind, "subject": subject,
        "config": described("application/vnd.oci.empty.v1+json", empty), "layers": [described(kind, empty)],
    }  # fmt: skip
    data = json.dumps(manifest).encode()
    faulty.add(digest(data), OCI_MANIFEST, data)
    return described(OCI_MANIFEST, data, artifactType=kind)


def index_of(entries: list[dict[str, object]]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


@pytest.mark.parametrize("api", [True, False], ids=["by the API", "by the tag"])
async def test_what_refers_to_an_image_is_found(leaf: ImagesLeaf, api: bool) -> None:
    with faulty_registry() as faulty:
        target = faulty.add_image("1", [layer([Entry("f", b"1")])])
        subject = described(OCI_MANIFEST, faulty.manifests["1"][1])
        kinds = ("application/vnd.example.signature", "application/spdx+json")
        entries = [artifact(faulty, subject, kind) for kind in kinds]
        if not api:
            faulty.add(target.replace(":", "-"), OCI_INDEX, index_of(entries))

        def on(handler: Handler, seen: Seen) -> bool:
            if not api or f"/referrers/{target}" not in seen.path:
                return False
            if "page=2" in seen.path:
                handler.answer(200, index_of(entries[1:]), Content_Type=OCI_INDEX)
            else:
                following = f'</v2/x/referrers/{target}?page=2>; rel="next"'
                handler.answer(200, index_of(entries[:1]), Content_Type=OCI_INDEX, Link=following)
            return True

        faulty.on = on
        name = f"{faulty.host}/x:1"
        answer = await leaf.images.Referrers(pb.ReferrersRequest(name=name))
        assert answer.subject.digest == target
        assert [found.artifact_type for found in answer.referrers] == list(kinds)
        answer = await leaf.images.Referrers(pb.ReferrersRequest(name=name, artifact_type=kinds[1]))
        assert [found.digest for found in answer.referrers] == [entries[1]["digest"]]


async def test_an_image_that_nothing_refers_to_has_no_referrers(leaf: ImagesLeaf) -> None:
    with faulty_registry() as faulty:
        faulty.add_image("1", [layer([Entry("f", b"1")])])
        answer = await leaf.images.Referrers(pb.ReferrersRequest(name=f"{faulty.host}/x:1"))
        assert not answer.referrers


@pytest.mark.parametrize("knows", [True, False], ids=["registry with the API", "registry without"])
async def test_an_image_with_a_subject_is_announced_where_the_registry_does_not_do_it(
    leaf: ImagesLeaf, sink: Sink, knows: bool
) -> None:
    sink.subject = knows
    with faulty_registry() as source:
        made = layer([Entry("f", b"1")])
        config = image_config([made])
        subject = described(OCI_MANIFEST, b"what it refers to")
        manifest = {
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described(OCI_CONFIG, config),
            "layers": [described(OCI_LAYER, made)], "subject": subject,
        }  # fmt: skip
        for data in (config, made):
            source.blobs[digest(data)] = data
        pushed = source.add("1", OCI_MANIFEST, json.dumps(manifest).encode())
        await leaf.pull(f"{source.host}/x:1")
        tag = str(subject["digest"]).replace(":", "-")
        earlier = described(OCI_MANIFEST, b"another")
        sink.faulty.add(tag, OCI_INDEX, index_of([earlier]))
        for _ in range(2):
            assert await leaf.push(f"{source.host}/x:1", f"{sink.faulty.host}/x:1") == pushed
        listed = [entry["digest"] for entry in json.loads(sink.faulty.manifests[tag][1])["manifests"]]
        assert listed == [earlier["digest"]] + ([] if knows else [pushed])
