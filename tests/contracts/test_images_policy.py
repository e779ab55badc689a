"""A policy lets in what a key of it has signed, and nothing else."""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import cosign
from support.cosign import Key, Signed, payload
from support.faulty import OCI_INDEX, OCI_MANIFEST, Faulty, Handler, Seen, described, manifest_of
from support.images import Entry, digest, image_config, layer
from support.images_leaf import ImagesLeaf
from support.policies import CLOSED, OPEN, archive, guarded, put, refused, sign
from support.registry import Registry, running, skopeo
from support.requirements import needs

from corral.api.images.v1 import images_pb2 as pb
from corral.images.policy.rules import Kind, Rule
from corral.rpc.errors import PermissionDenied

pytestmark = needs("root", "overlayfs", "docker-registry", "skopeo", "openssl")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as made:
        yield made


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Key]:
    where = tmp_path_factory.mktemp("keys")
    names = {"ours": "ecdsa", "theirs": "ecdsa", "rsa": "rsa", "ed25519": "ed25519", "p384": "ecdsa-p384"}
    return {name: Key.make(where, name, algorithm) for name, algorithm in names.items()}


@pytest.fixture(scope="module")
def ours(keys: dict[str, Key]) -> Key:
    return keys["ours"]


@pytest.fixture
async def leaf(tmp_path: Path, registry: Registry, ours: Key) -> AsyncIterator[ImagesLeaf]:
    """Our key is wanted of the registry; the rest of the world is open."""
    async with guarded(tmp_path, OPEN, Rule(registry.host, keys=(ours.public,))) as made:
        yield made


# What is let in


@pytest.mark.parametrize("kind", ["ours", "rsa", "ed25519", "p384"])
async def test_an_image_that_a_key_of_the_policy_has_signed_is_pulled_and_used(
    tmp_path: Path, registry: Registry, keys: dict[str, Key], kind: str
) -> None:
    image = put(registry, tmp_path, f"signed-{kind}")
    sign(registry, f"signed-{kind}", image, keys[kind])
    async with guarded(tmp_path, CLOSED, Rule(registry.host, keys=(keys[kind].public,))) as leaf:
        pulled = await leaf.pull(f"{registry.host}/signed-{kind}:1")
        assert pulled.target.digest == image
        await leaf.prepare("c", image=pulled.name)
        await leaf.prepare("d", image=pulled.id)
        await leaf.prepare("e", parent=pulled.chain_id)


async def test_one_of_several_keys_is_enough(tmp_path: Path, registry: Registry, keys: dict[str, Key]) -> None:
    image = put(registry, tmp_path, "several")
    sign(registry, "several", image, keys["theirs"], keys["rsa"])
    rule = Rule(registry.host, keys=(keys["ed25519"].public, keys["ours"].public, keys["rsa"].public))
    async with guarded(tmp_path, CLOSED, rule) as leaf:
        await leaf.pull(f"{registry.host}/several:1")


async def test_a_signature_that_refers_to_the_image_counts_as_one_under_its_tag(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key, keys: dict[str, Key]
) -> None:
    image = put(registry, tmp_path, "referred")
    size = int(registry.request("HEAD", f"referred/manifests/{image}", {"Accept": OCI_MANIFEST})[0]["Content-Length"])
    what = payload(f"{registry.host}/referred", image)
    cosign.refer(registry, "referred", image, size, [Signed.by(keys["theirs"], what)])
    await refused(leaf, f"{registry.host}/referred:1", "not by a key of the policy")
    cosign.refer(registry, "referred", image, size, [Signed.by(keys["theirs"], what), Signed.by(ours, what)])
    await leaf.pull(f"{registry.host}/referred:1")


async def test_what_skopeo_has_signed_is_let_in(tmp_path: Path, registry: Registry) -> None:
    """Another maker of such signatures, which names the tag too."""
    (tmp_path / "passphrase").write_text("secret")
    settings = tmp_path / "registries.d"
    settings.mkdir()
    (settings / "all.yaml").write_text("default-docker:\n  use-sigstore-attachments: true\n")
    prefix, phrase = tmp_path / "skopeo", tmp_path / "passphrase"
    skopeo("generate-sigstore-key", "--output-prefix", prefix, "--passphrase-file", phrase)
    source = archive(tmp_path / "x.tar", "x:1", "skopeo")
    skopeo(
        "--insecure-policy", "--registries.d", settings, "copy", "--dest-tls-verify=false",
        "--sign-by-sigstore-private-key", f"{prefix}.private", "--sign-passphrase-file", phrase,
        f"oci-archive:{source}", f"docker://{registry.host}/by-skopeo:1",
    )  # fmt: skip
    async with guarded(tmp_path, CLOSED, Rule(registry.host, keys=(Path(f"{prefix}.pub"),))) as leaf:
        pulled = await leaf.pull(f"{registry.host}/by-skopeo:1")
        await leaf.prepare("c", image=pulled.name)
        with pytest.raises(PermissionDenied, match="no signature of it was verified here"):
            await leaf.images.Tag(pb.TagImageRequest(source=pulled.name, target=f"{registry.host}/by-skopeo:2"))


async def index(registry: Registry, tmp_path: Path, name: str) -> tuple[str, str]:
    """Digests of an index, and of the one manifest in it."""
    image = put(registry, tmp_path, name, tag="amd64")
    _, data = registry.request("GET", f"{name}/manifests/{image}", {"Accept": OCI_MANIFEST})
    entry = described(OCI_MANIFEST, data, platform={"os": "linux", "architecture": "amd64"})
    document = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode()
    return cosign.put_manifest(registry, name, "1", document, OCI_INDEX), image


async def test_of_an_index_either_it_or_the_manifest_that_is_taken_is_signed(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key
) -> None:
    whole, _ = await index(registry, tmp_path, "whole")
    sign(registry, "whole", whole, ours)
    assert (await leaf.pull(f"{registry.host}/whole:1", all_platforms=True)).target.digest == whole
    await leaf.images.Remove(pb.RemoveImageRequest(name=f"{registry.host}/whole:1"))
    _, one = await index(registry, tmp_path, "one")
    sign(registry, "one", one, ours)
    await refused(leaf, f"{registry.host}/one:1", "no signature", all_platforms=True)
    assert (await leaf.pull(f"{registry.host}/one:1")).manifest.digest == one


async def test_without_a_policy_nothing_is_asked(tmp_path: Path, registry: Registry) -> None:
    put(registry, tmp_path, "free")
    asked = registry.log().count(".sig")
    async with guarded(tmp_path) as leaf:
        await leaf.pull(f"{registry.host}/free:1")
    assert registry.log().count(".sig") == asked


# What is refused


async def test_an_image_without_a_signature_is_refused(leaf: ImagesLeaf, registry: Registry, tmp_path: Path) -> None:
    put(registry, tmp_path, "bare")
    e = await refused(leaf, f"{registry.host}/bare:1", "it has no signature")
    assert f"the policy for {registry.host}" in str(e)


async def test_a_signature_by_another_key_is_refused(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, keys: dict[str, Key]
) -> None:
    image = put(registry, tmp_path, "theirs")
    sign(registry, "theirs", image, keys["theirs"])
    await refused(leaf, f"{registry.host}/theirs:1", "its signature is not by a key of the policy")
    sign(registry, "theirs", image, keys["theirs"], keys["rsa"])
    await refused(leaf, f"{registry.host}/theirs:1", "none of its 2 signatures is by a key of the policy")


async def test_a_signature_copied_from_another_image_is_refused(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key
) -> None:
    good = put(registry, tmp_path, "copied", "good", tag="good")
    bad = put(registry, tmp_path, "copied", "bad", tag="bad")
    cosign.attach(registry, "copied", bad, [Signed.by(ours, payload(f"{registry.host}/copied", good))])
    await refused(leaf, f"{registry.host}/copied:bad", f"its signature is for another image, {good}")


async def test_a_signature_copied_from_another_repository_is_refused(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key
) -> None:
    image = put(registry, tmp_path, "elsewhere")
    sign(registry, "elsewhere", image, ours, reference=f"{registry.host}/team/app")
    await refused(leaf, f"{registry.host}/elsewhere:1", f"for another repository, {registry.host}/team/app")


async def test_a_copy_is_known_by_the_name_that_it_was_signed_under(
    tmp_path: Path, registry: Registry, ours: Key
) -> None:
    image, name = put(registry, tmp_path, "copies/team/app"), f"{registry.host}/copies/team/app:1"
    sign(registry, "copies/team/app", image, ours, reference="upstream.example/x/team/app")
    rule = Rule(f"{registry.host}/copies", keys=(ours.public,), signed_prefix="upstream.example/x")
    async with guarded(tmp_path, CLOSED, rule) as leaf:
        await leaf.pull(name)
        await leaf.prepare("c", image=name)
    async with guarded(tmp_path, CLOSED, replace(rule, signed_prefix="upstream.example/y")) as leaf:
        with pytest.raises(PermissionDenied, match="no signature of it was verified"):
            await leaf.prepare("d", image=name)
        with pytest.raises(PermissionDenied, match=r"x/team/app instead of upstream\.example/y/team/app"):
            await leaf.pull(name)


async def test_a_signature_that_names_another_tag_is_refused_under_this_one(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key
) -> None:
    """An old version does not come back under the name of the new one."""
    image = put(registry, tmp_path, "old", tag="2")
    sign(registry, "old", image, ours, reference=f"{registry.host}/old:1")
    await refused(leaf, f"{registry.host}/old:2", "for another tag, '1'")
    await leaf.pull(f"{registry.host}/old@{image}")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("cosign container image", "atomic container"), "type is not 'cosign"),
        (lambda text: "[" * 1000, "payload"),
        (lambda text: text.replace("critical", "kritical"), "critical is missing"),
        (lambda text: text.replace("sha256:", "md5:"), "docker-manifest-digest"),
        (lambda text: text.replace("docker-reference", "reference"), "docker-reference is missing"),
        (lambda text: text + " " * (1 << 20), "a payload of .* bytes, which is too much"),
    ],
)  # fmt: skip
async def test_a_signed_payload_that_is_none_is_refused(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key, change: object, why: str
) -> None:
    image = put(registry, tmp_path, "odd")
    what = change(payload(f"{registry.host}/odd", image).decode()).encode()  # type: ignore[operator]
    cosign.attach(registry, "odd", image, [Signed.by(ours, what)])
    await refused(leaf, f"{registry.host}/odd:1", why)


@pytest.mark.parametrize("value", ["", "!!!", "AAAA", "QUFB" * 100_000])
async def test_a_signature_that_is_none_is_refused(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, value: str
) -> None:
    image = put(registry, tmp_path, "garbled")
    what = payload(f"{registry.host}/garbled", image)
    for data in (b"{}", what):
        cosign.put_blob(registry, "garbled", data)
    entry = Signed(what, b"").layer | {"annotations": {cosign.ANNOTATION: value}}
    cosign.put_manifest(registry, "garbled", cosign.tag_of(image), cosign.artifact([entry]))
    await refused(leaf, f"{registry.host}/garbled:1", "not in base64|not by a key")


async def test_the_right_signature_is_found_among_hundreds(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, ours: Key, keys: dict[str, Key]
) -> None:
    """What no key of ours has signed is not even fetched."""
    image = put(registry, tmp_path, "many")
    name = f"{registry.host}/many"
    template = Signed.by(keys["theirs"], payload(name, image))
    many = [replace(template, payload=payload(name, image, n=n)) for n in range(500)]
    for data in (b"{}", many[0].payload, template.payload):
        cosign.put_blob(registry, "many", data)
    layers = [many[0].layer, *(many[0].layer | {"annotations": each.layer["annotations"]} for each in many[1:])]
    cosign.put_manifest(registry, "many", cosign.tag_of(image), cosign.artifact(layers))
    await refused(leaf, f"{name}:1", "none of its 500 signatures is by a key of the policy")
    assert f"/blobs/{digest(many[0].payload)}" not in registry.log().split("PUT")[-1]
    last = Signed.by(ours, template.payload)
    cosign.put_manifest(registry, "many", cosign.tag_of(image), cosign.artifact([*layers, last.layer]))
    await leaf.pull(f"{name}:1")


async def test_more_signatures_than_anybody_makes_are_not_looked_through(
    leaf: ImagesLeaf, registry: Registry, tmp_path: Path, keys: dict[str, Key]
) -> None:
    image = put(registry, tmp_path, "flood")
    one = Signed.by(keys["theirs"], payload(f"{registry.host}/flood", image))
    for data in (b"{}", one.payload):
        cosign.put_blob(registry, "flood", data)
    cosign.put_manifest(registry, "flood", cosign.tag_of(image), cosign.artifact([one.layer] * 1001))
    await refused(leaf, f"{registry.host}/flood:1", "1001 entries; at most 1000")


def signed_in(faulty: Faulty, tag: str, what: bytes, key: Key | None) -> str:
    """An image in the faulty registry, signed or not; returns its digest."""
    made = [layer([Entry("f", what)])]
    image = faulty.add(tag, OCI_MANIFEST, manifest_of(faulty, made, image_config(made)))
    if key is not None:
        one = Signed.by(key, payload(f"{faulty.host}/x", image))
        faulty.blobs |= {digest(one.payload): one.payload}
        faulty.add(cosign.tag_of(image), OCI_MANIFEST, cosign.artifact([one.layer]))
    return image


async def test_a_tag_that_moves_after_the_check_brings_what_was_checked(
    tmp_path: Path, faulty: Faulty, ours: Key
) -> None:
    good = signed_in(faulty, "1", b"good", ours)
    bad = signed_in(faulty, "bad", b"bad", None)

    def on(handler: Handler, seen: Seen) -> bool:
        if seen.path.endswith("/manifests/1") and seen.method == "GET":
            handler.content(seen)
            faulty.manifests["1"] = faulty.manifests[bad]
            return True
        return False

    faulty.on = on
    async with guarded(tmp_path, CLOSED, Rule(faulty.host, keys=(ours.public,))) as leaf:
        assert (await leaf.pull(f"{faulty.host}/x:1")).target.digest == good
        with pytest.raises(PermissionDenied, match="it has no signature"):
            await leaf.pull(f"{faulty.host}/x:1")
        assert (await leaf.images.Get(pb.GetImageRequest(name=f"{faulty.host}/x:1"))).target.digest == good


@pytest.mark.parametrize("size", [-1, 1])
async def test_a_payload_that_is_another_than_was_signed_is_not_believed(
    tmp_path: Path, faulty: Faulty, ours: Key, size: int
) -> None:
    image = signed_in(faulty, "1", b"x", ours)
    name = digest(payload(f"{faulty.host}/x", image))
    faulty.blobs[name] = faulty.blobs[name][:size] if size < 0 else faulty.blobs[name] + b" "
    async with guarded(tmp_path, CLOSED, Rule(faulty.host, keys=(ours.public,))) as leaf:
        await refused(leaf, f"{faulty.host}/x:1", "what its signature is for cannot be read: .* gave something else")


async def test_where_the_policy_takes_nothing_the_registry_is_not_even_asked(
    tmp_path: Path, faulty: Faulty, ours: Key
) -> None:
    signed_in(faulty, "1", b"x", ours)
    async with guarded(tmp_path, OPEN, Rule(faulty.host, Kind.REJECT)) as leaf:
        await refused(leaf, f"{faulty.host}/x:1", "it takes none")
    assert not faulty.seen


async def test_a_registry_that_does_not_say_what_refers_to_an_image_is_not_waited_for(
    tmp_path: Path, faulty: Faulty, ours: Key
) -> None:
    """Nor does an artifact that cannot be read stand before one that can."""
    image = signed_in(faulty, "1", b"x", None)
    size = len(faulty.manifests["1"][1])
    broken = cosign.artifact([], subject={"mediaType": OCI_MANIFEST, "digest": image, "size": size})
    one = Signed.by(ours, payload(f"{faulty.host}/x", image))
    faulty.blobs |= {digest(one.payload): one.payload}
    good = cosign.artifact([one.layer], subject={"mediaType": OCI_MANIFEST, "digest": image, "size": size})
    entries = [{**described(OCI_MANIFEST, data), "artifactType": cosign.ARTIFACT} for data in (broken, good)]
    page = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    faulty.add(digest(good), OCI_MANIFEST, good)
    faulty.manifests[digest(broken)] = (OCI_MANIFEST, b"[" * 1000)
    answers = [(400, b""), (200, page)]

    def on(handler: Handler, seen: Seen) -> bool:
        if "/referrers/" in seen.path:
            status, body = answers[0]
            handler.answer(status, body, Content_Type=OCI_INDEX)
        return "/referrers/" in seen.path

    faulty.on = on
    async with guarded(tmp_path, CLOSED, Rule(faulty.host, keys=(ours.public,))) as leaf:
        await refused(leaf, f"{faulty.host}/x:1", "no signature under its tag, and what refers to it is not told")
        del answers[0]
        assert (await leaf.pull(f"{faulty.host}/x:1")).target.digest == image
