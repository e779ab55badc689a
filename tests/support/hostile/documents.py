"""Manifests, indexes and configs that lie, as a registry or a layout has them."""

import json
from collections.abc import Callable, Mapping

from support.hostile.case import DocumentCase, Documents
from support.images import Entry, digest, image_config, layer

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
TAR = layer([Entry("f", b"x")])
GOOD = image_config([TAR])

type Json = dict[str, object]


def described(data: bytes, media_type: str, **more: object) -> Json:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


def image(
    described_layers: list[Json],
    blobs: list[bytes],
    *,
    config: bytes = GOOD,
    config_as: Mapping[str, object] | None = None,
    manifest: Callable[[bytes], bytes] = bytes,
    **more: object,
) -> Documents:
    """An image of these layer descriptors. config_as: other fields of the config's descriptor."""
    made = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described(config, CONFIG) | dict(config_as or {})}
    target = manifest(dumped({**made, "layers": described_layers, **more}))
    return Documents({digest(data): data for data in (config, *blobs)}, target, MANIFEST)


def _one(config: bytes = GOOD, **more: object) -> Callable[[str], Documents]:
    """One true layer, and a config."""
    return lambda _url: image([described(TAR, LAYER)], [TAR], config=config, **more)  # type: ignore[arg-type]


def _layer(**fields: object) -> Callable[[str], Documents]:
    """One layer, with other fields in its descriptor."""
    return lambda _url: image([described(TAR, LAYER) | fields], [TAR])


def _changed(**fields: object) -> bytes:
    return dumped(json.loads(GOOD) | fields)


def _inner(**fields: object) -> bytes:
    """A config with other fields in what reaches the container."""
    document = json.loads(GOOD)
    document["config"] |= fields
    return dumped(document)


def _foreign(url: str) -> Documents:
    """A layer that is not there, but said to be at an address."""
    absent = layer([Entry("g", b"not here")])
    return image([described(absent, FOREIGN, urls=[url])], [], config=image_config([absent]))


def _nested(depth: int) -> Callable[[str], Documents]:
    def build(_url: str) -> Documents:
        inner = image([described(TAR, LAYER)], [TAR])
        blobs, data, media_type = dict(inner.blobs), inner.target, MANIFEST
        for _ in range(depth):
            blobs[digest(data)] = data
            entry = described(data, media_type, platform={"os": "linux", "architecture": "amd64"})
            data, media_type = dumped({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}), INDEX
        return Documents(blobs, data, INDEX)

    return build


def _index(entries: list[Json], blobs: list[bytes] | None = None, **more: object) -> Documents:
    target = dumped({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries, **more})
    return Documents({digest(data): data for data in blobs or []}, target, INDEX)


def _circle(_url: str) -> Documents:
    """Two indexes that name each other, which only lying digests make possible."""
    one = dumped({"schemaVersion": 2, "manifests": [described(b"two", INDEX) | {"size": 1}]})
    two = dumped({"schemaVersion": 2, "manifests": [described(one, INDEX)]})
    target = dumped({"schemaVersion": 2, "mediaType": INDEX, "manifests": [described(b"two", INDEX, size=len(two))]})
    return Documents({digest(one): one, digest(b"two"): two}, target, INDEX)


def _deep_json(depth: int) -> bytes:
    return b'{"schemaVersion":2,"a":' + b"[" * depth + b"]" * depth + b"}"


def _twice(data: bytes) -> bytes:
    """A key that the document has already, with another value: readers differ in which one counts."""
    return data.replace(b'"layers":', b'"layers": [], "layers":', 1)


_NUMBER = "is not a whole number"
_JSON = "is not JSON"

DOCUMENTS: tuple[DocumentCase, ...] = (
    DocumentCase("a config that is a list", _one(b"[]"), "is not a JSON object"),
    DocumentCase("a config that is a number", _one(b"7"), "is not a JSON object"),
    DocumentCase("a config that is nothing", _one(b""), _JSON),
    DocumentCase("a config that is a tar", _one(layer([Entry("g", b"y")])), _JSON),
    DocumentCase("a config of nine mebibytes", _one(_changed(comment="x" * (9 << 20))), "at most 8388608"),
    DocumentCase("a config of 100,000 levels", _one(_deep_json(100_000)), "nested too deeply"),
    DocumentCase("a config of half characters", _one(GOOD.replace(b'"sh"', b'"\\ud800"')), _JSON),
    DocumentCase("a config that is not UTF-8", _one(GOOD.replace(b'"sh"', b'"\xff"')), _JSON),
    DocumentCase("a number of 5,000 digits", _one(GOOD.replace(b"{", b'{"n":' + b"9" * 5000 + b",", 1)), _JSON),
    DocumentCase("a config without layers", _one(_changed(rootfs=None)), "its config tells of 0"),
    DocumentCase("a config of other layers", _one(image_config([b"other"])), "the image's config says"),
    DocumentCase("a config of more layers", _one(image_config([TAR, TAR])), "its config tells of 2"),
    DocumentCase(
        "a config of 100,000 layers", _one(_changed(rootfs={"diff_ids": [digest(TAR)] * 90_000})), "at most 500"
    ),
    DocumentCase("a config whose layers climb", _one(_changed(rootfs={"diff_ids": ["../../x"]})), "64 hex digits"),
    DocumentCase("a config whose program is an object", _one(_inner(Cmd={"a": 1})), "is not a list"),
    DocumentCase("a config whose environment is a number", _one(_inner(Env=7)), "is not a list"),
    DocumentCase("a config whose labels are lists", _one(_inner(Labels={"a": []})), "is not a string"),
    DocumentCase("a config whose user is a number", _one(_inner(User=0)), "is not a string"),
    DocumentCase("a health check of 10^40 seconds", _one(_inner(Healthcheck={"Interval": 10**40})), "is not between"),
    DocumentCase("an artifact", _one(config_as={"mediaType": "application/x.evil"}), "is not a container image"),
    DocumentCase(
        "a config with a larger size",
        _one(config_as={"size": len(GOOD) + 1}),
        "its descriptor says",
        refused_pull="bytes",
    ),
    DocumentCase(
        "a config with a smaller size",
        _one(config_as={"size": len(GOOD) - 1}),
        "its descriptor says",
        refused_pull="bytes",
    ),
    DocumentCase("a layer with a larger size", _layer(size=len(TAR) + 1), "its descriptor says", refused_pull="bytes"),
    DocumentCase("a layer with a smaller size", _layer(size=len(TAR) - 1), "its descriptor says", refused_pull="bytes"),
    DocumentCase("a layer with a negative size", _layer(size=-1), "is not between"),
    DocumentCase("a layer of 10^30 bytes", _layer(size=10**30), "is not between", archive_only=True),
    DocumentCase("a layer of half a byte", _layer(size=0.5), _NUMBER, archive_only=True),
    DocumentCase("a layer of true bytes", _layer(size=True), _NUMBER, archive_only=True),
    DocumentCase("a layer of words", _layer(size="many"), _NUMBER, archive_only=True),
    DocumentCase("a layer with another digest", _layer(digest=digest(b"other")), "lacks layer", archive_only=True),
    DocumentCase("a layer whose digest climbs", _layer(digest="sha256:../../../x"), "64 hex digits", archive_only=True),
    DocumentCase("a layer of another hash", _layer(digest="md5:" + "0" * 32), "64 hex digits", archive_only=True),
    DocumentCase("a layer that is an index", _layer(mediaType=INDEX), "which is not a tar"),
    DocumentCase("a layer that is a manifest", _layer(mediaType=MANIFEST), "which is not a tar"),
    DocumentCase("a layer that is encrypted", _layer(mediaType=LAYER + "+encrypted"), "which is not a tar"),
    DocumentCase("a layer that is the config", _layer(**described(GOOD, LAYER)), "which is not a tar"),
    DocumentCase("a layer elsewhere", _foreign, "lacks layer", archive_only=True),  # a pull may ask there
    DocumentCase(
        "a manifest of 100,000 layers",
        lambda _: image([{"mediaType": LAYER, "digest": digest(TAR), "size": 1}] * 100_000, [TAR]),
        "at most 4194304",
        archive_only=True,
    ),
    DocumentCase(
        "a manifest of 20,000 layers",
        lambda _: image([{"mediaType": LAYER, "digest": digest(TAR), "size": 1}] * 20_000, [TAR]),
        "at most 500",
    ),
    DocumentCase(
        "a manifest of five mebibytes", _one(annotations={"a": "x" * (5 << 20)}), "at most 4194304", archive_only=True
    ),
    DocumentCase("a manifest of another century", _one(schemaVersion=1), "is not 2", archive_only=True),
    DocumentCase(
        "a manifest that is an index too", _one(manifests=[]), "both an index and a manifest", archive_only=True
    ),
    DocumentCase(
        "a manifest of 100,000 levels",
        _one(manifest=lambda _: _deep_json(100_000)),
        "nested too deeply",
        archive_only=True,
    ),
    DocumentCase("a manifest with its layers twice", _one(manifest=_twice), "'layers' twice"),
    DocumentCase("a manifest whose layers are an object", _one(layers={}), "is not a list", archive_only=True),
    DocumentCase("a manifest whose layers are words", _one(layers=["x"]), "is not an object", archive_only=True),
    DocumentCase(
        "a manifest that says it is an index", _one(mediaType=INDEX), "but its descriptor says", archive_only=True
    ),
    DocumentCase("five indexes deep", _nested(6), "nested more than", refused_pull="nested"),
    DocumentCase("indexes in a circle", _circle, "has other content", archive_only=True),
    DocumentCase(
        "an index of itself",
        lambda _: _index([described(b"x", INDEX, size=1)], []),
        "lacks blob",
        archive_only=True,
    ),
    DocumentCase("an index of nothing", lambda _: _index([]), "has nothing for"),
    DocumentCase(
        "an index of 1,001", lambda _: _index([described(b"x", MANIFEST)] * 1001), "at most 1000", archive_only=True
    ),
    DocumentCase(
        "an index of objects",
        lambda _: _index([described(b"x", MANIFEST, platform=7)]),
        "is not an object",
        archive_only=True,
    ),
)
