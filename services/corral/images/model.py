"""Manifests, indexes and image configs as typed values.

Only the fields below are read; whatever else a document holds stays in its blob and steers nothing.
Source: OCI image-spec manifest.md, image-index.md, config.md; docker image manifest v2 schema 2, image spec v1.2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from corral.images.digest import Digest, parse_digest
from corral.images.document import Document, parse_document
from corral.rpc.errors import InvalidArgument

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.gzip|\.zstd)?)"
)

MAX_MANIFEST_BYTES = 4 << 20  # what registries take
MAX_CONFIG_BYTES = 8 << 20
MAX_BLOB_BYTES = 1 << 40  # far more than any layer has
MAX_LAYERS = 500  # the kernel's OVL_MAX_STACK
MAX_INDEX_ENTRIES = 1000
MAX_HISTORY = 10_000

_EMPTY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Platform:
    """Source: image-index.md "platform"."""

    os: str = ""
    architecture: str = ""
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Source: descriptor.md."""

    media_type: str
    digest: Digest
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    platform: Platform | None = None
    artifact_type: str = ""
    # Where else the content may be had.
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one image consists of. Source: manifest.md."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Manifests to choose from. Source: image-index.md."""

    media_type: str
    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Healthcheck:
    """Source: docker image spec v1.2 "Healthcheck". Times in nanoseconds; 0: the default."""

    test: tuple[str, ...] = ()
    interval_ns: int = 0
    timeout_ns: int = 0
    start_period_ns: int = 0
    start_interval_ns: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The part of a config that may reach a container. Source: config.md "config"."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    healthcheck: Healthcheck | None = None


@dataclass(frozen=True, slots=True)
class History:
    """How a layer came to be. Source: config.md "history"."""

    created: datetime | None
    created_by: str
    author: str
    comment: str
    empty_layer: bool


@dataclass(frozen=True, slots=True)
class Config:
    """A whole image config; its digest is the image id. Source: config.md."""

    created: datetime | None
    platform: Platform
    config: ImageConfig
    diff_ids: tuple[Digest, ...]
    history: tuple[History, ...]


def parse_descriptor(document: Document) -> Descriptor:
    """Raises InvalidArgument."""
    platform = document.child("platform")
    return Descriptor(
        media_type=document.text("mediaType"),
        digest=parse_digest(document.required_text("digest"), f"{document.where}: digest"),
        size_bytes=document.integer("size"),
        annotations=document.text_map("annotations"),
        platform=_parse_platform(platform) if platform else None,
        artifact_type=document.text("artifactType"),
        urls=document.texts("urls"),
    )


def parse_manifest_or_index(data: bytes, what: str, *, media_type: str = "") -> Manifest | Index:
    """The manifest or index in `data`; `media_type` is what its descriptor claims, if there is one.

    A document that could be read as both is refused (CVE-2021-41190). Raises InvalidArgument.
    """
    document = parse_document(data, what, max_bytes=MAX_MANIFEST_BYTES)
    if document.integer("schemaVersion") != 2:
        is_old = document.integer("schemaVersion") == 1 or "fsLayers" in document
        raise document.refusal(
            "schemaVersion",
            "is not 2: docker's image manifest schema 1 is not taken any more, push the image again by a newer builder"
            if is_old
            else "is not 2: it is no manifest of an image",
        )
    declared = document.text("mediaType")
    if declared and media_type and declared != media_type:
        raise document.refusal("mediaType", f"is {declared[:100]!r}, but its descriptor says {media_type[:100]!r}")
    if "manifests" in document and ("layers" in document or "config" in document):
        raise InvalidArgument(f"{what} is both an index and a manifest", reason="BAD_DOCUMENT")
    media_type = declared or media_type or (OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    if media_type in INDEXES:
        return _parse_index(document, media_type)
    if media_type in MANIFESTS:
        return _parse_manifest(document, media_type)
    raise document.refusal("mediaType", f"{media_type[:100]!r} is not an image's")


def parse_index(data: bytes, what: str) -> Index:
    """As above, but an index is wanted. Raises InvalidArgument."""
    index = parse_manifest_or_index(data, what, media_type="")
    if not isinstance(index, Index):
        raise InvalidArgument(f"{what} is not an index", reason="BAD_DOCUMENT")
    return index


def _parse_index(document: Document, media_type: str) -> Index:
    entries = document.children("manifests", at_most=MAX_INDEX_ENTRIES)
    return Index(media_type, tuple(parse_descriptor(entry) for entry in entries))


def _parse_manifest(document: Document, media_type: str) -> Manifest:
    config = document.child("config")
    if config is None:
        raise document.refusal("config", "is missing")
    layers = document.children("layers", at_most=MAX_LAYERS)
    return Manifest(media_type, parse_descriptor(config), tuple(parse_descriptor(layer) for layer in layers))


def check_runnable(manifest: Manifest, what: str) -> None:
    """Raises InvalidArgument if this is an artifact and not a root file system."""
    if manifest.config.media_type not in CONFIGS:
        raise InvalidArgument(
            f"{what} is not a container image: its config is {manifest.config.media_type[:100]!r}",
            reason="NOT_AN_IMAGE",
        )
    for layer in manifest.layers:
        if _LAYER.fullmatch(layer.media_type) is None:
            raise InvalidArgument(
                f"{what} has a layer of type {layer.media_type[:100]!r}, which is not a tar", reason="NOT_AN_IMAGE"
            )
        if layer.digest == manifest.config.digest:
            raise InvalidArgument(f"{what} has its config for a layer, which is not a tar", reason="NOT_AN_IMAGE")


def parse_config(data: bytes, what: str) -> Config:
    """The image config in `data`. Raises InvalidArgument."""
    document = parse_document(data, what, max_bytes=MAX_CONFIG_BYTES)
    rootfs = document.child("rootfs")  # an image without layers may lack it
    diff_ids = rootfs.texts("diff_ids") if rootfs else ()
    if len(diff_ids) > MAX_LAYERS:
        raise document.refusal("rootfs", f"has {len(diff_ids)} layers; the kernel stacks at most {MAX_LAYERS}")
    config = document.child("config")
    return Config(
        created=parse_time(document.text("created")),
        platform=_parse_platform(document),
        config=_parse_image_config(config) if config else ImageConfig(),
        diff_ids=tuple(parse_digest(text, f"{what}: diff id") for text in diff_ids),
        history=tuple(_parse_history(entry) for entry in document.children("history", at_most=MAX_HISTORY)),
    )


def _parse_platform(document: Document) -> Platform:
    return Platform(
        os=document.text("os"),
        architecture=document.text("architecture"),
        variant=document.text("variant"),
        os_version=document.text("os.version"),
        os_features=document.texts("os.features"),
    )


def _parse_image_config(document: Document) -> ImageConfig:
    healthcheck = document.child("Healthcheck")
    return ImageConfig(
        user=document.text("User"),
        env=document.texts("Env"),
        entrypoint=document.words("Entrypoint"),
        cmd=document.words("Cmd"),
        working_dir=document.text("WorkingDir"),
        volumes=document.keys("Volumes"),
        exposed_ports=document.keys("ExposedPorts"),
        stop_signal=document.text("StopSignal"),
        labels=document.text_map("Labels"),
        healthcheck=_parse_healthcheck(healthcheck) if healthcheck else None,
    )


def _parse_healthcheck(document: Document) -> Healthcheck:
    return Healthcheck(
        test=document.texts("Test"),
        interval_ns=document.integer("Interval"),
        timeout_ns=document.integer("Timeout"),
        start_period_ns=document.integer("StartPeriod"),
        start_interval_ns=document.integer("StartInterval"),
        retries=document.integer("Retries", high=(1 << 31) - 1),
    )


def _parse_history(document: Document) -> History:
    return History(
        created=parse_time(document.text("created")),
        created_by=document.text("created_by"),
        author=document.text("author"),
        comment=document.text("comment"),
        empty_layer=document.boolean("empty_layer"),
    )


def parse_time(text: str) -> datetime | None:
    """An RFC 3339 time; None where there is none, or not one: it is only shown."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
