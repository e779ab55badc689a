"""The files of an archive that is to be written, as a table: an OCI layout, and for docker its own table beside.

    blobs/<algorithm>/<hex>  every document and all content, as they are
    index.json               one entry for each name, or for each image that is to have none
    manifest.json            docker-archive only: configs and layers by file, with familiar names
    oci-layout

This is what `docker save` writes since 25; older readers take manifest.json, others index.json, and with that the
digests that the image was built with.

Source: OCI image-spec image-layout.md; docker image spec v1.3 "Combined Image JSON + Filesystem Changeset Format".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from corral.images.archives.docker import TABLE
from corral.images.archives.oci import FULL_NAME, INDEX, LAYOUT, REF_NAME
from corral.images.digest import Digest, algorithm_of, hex_of
from corral.images.holdings import Holding
from corral.images.model import OCI_INDEX, Descriptor, Manifest
from corral.images.reference import Reference

_VERSION = b'{"imageLayoutVersion":"1.0.0"}'


@dataclass(slots=True)
class Outgoing:
    """One image, and the names that it is to have in the archive."""

    target: Descriptor
    manifest: Descriptor
    content: Manifest
    holding: Holding
    names: list[Reference] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive: made here, or a blob."""

    name: str
    size_bytes: int
    data: bytes = b""
    blob: Digest | None = None


def members(images: Sequence[Outgoing], *, for_docker: bool) -> list[Member]:
    """In the order of their names, so that the same images make the same archive."""
    files = {LAYOUT: _VERSION, INDEX: _dumped(_index(images))}
    if for_docker:
        files[TABLE] = _dumped(_table(images))
    found = [Member(name, len(data), data) for name, data in files.items()]
    found += [Member(blob_name(digest), size, blob=digest) for digest, size in _blobs(images).items()]
    return sorted(found, key=lambda member: member.name)


def blob_name(digest: Digest) -> str:
    return f"blobs/{algorithm_of(digest)}/{hex_of(digest)}"


def _blobs(images: Sequence[Outgoing]) -> Mapping[Digest, int]:
    found: dict[Digest, int] = {}
    for image in images:
        found |= {digest: len(document.data) for digest, document in image.holding.documents.items()}
        found |= {digest: content.size_bytes for digest, content in image.holding.contents.items()}
    return found


def _index(images: Sequence[Outgoing]) -> Mapping[str, object]:
    entries = [_entry(image.target, name) for image in images for name in (image.names or (None,))]
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}


def _entry(target: Descriptor, name: Reference | None) -> Mapping[str, object]:
    entry: dict[str, object] = {"mediaType": target.media_type, "digest": target.digest, "size": target.size_bytes}
    if name is not None:
        entry["annotations"] = {FULL_NAME: str(name)} | ({REF_NAME: name.tag} if name.tag else {})
    return entry


def _table(images: Sequence[Outgoing]) -> Sequence[Mapping[str, object]]:
    return [
        {
            "Config": blob_name(image.content.config.digest),
            "RepoTags": [name.familiar for name in image.names if name.digest is None],
            "Layers": [blob_name(layer.digest) for layer in image.content.layers],
        }
        for image in images
    ]


def _dumped(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
