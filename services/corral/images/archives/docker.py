"""docker-archive: what `docker save` and many builders write.

    manifest.json            [{"Config": FILE, "RepoTags": ["name:tag", …], "Layers": [FILE, …]}, …]
    <config hex>.json        the image config
    <anything>/layer.tar     a layer, or a link to one

It has no manifest in the registries' sense; an OCI one is made, always the same for the same image, since more programs
take that from an OCI archive than take docker's.
Source: docker image spec v1.2 "Combined Image JSON + Filesystem Changeset Format".
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from corral.images.archives.found import FoundImage
from corral.images.archives.intake import Intake, StoredFile
from corral.images.details import make_details
from corral.images.digest import PREFIX
from corral.images.document import Document, parse_documents
from corral.images.layers.compression import HEAD_BYTES, Compression, detect
from corral.images.layers.errors import BadLayer
from corral.images.model import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    parse_config,
)
from corral.images.reference import parse_reference
from corral.rpc.errors import InvalidArgument

TABLE = "manifest.json"
MAX_IMAGES = 1000
_NAMED_BY_DIGEST = re.compile(r"(?:blobs/sha256/|sha256:)?([0-9a-f]{64})(?:\.json)?")
_SUFFIX = {Compression.PLAIN: "", Compression.GZIP: "+gzip", Compression.ZSTD: "+zstd"}

# Stores bytes that corral makes itself among the archive's files.
type Store = Callable[[bytes], StoredFile]


def read_docker_archive(intake: Intake, store: Store) -> list[FoundImage]:
    """The images of a docker-archive. Raises InvalidArgument, BadLayer, OSError."""
    table = intake.find(TABLE)
    if table is None:
        raise InvalidArgument("the archive has no manifest.json: it is not a docker-archive, or it was cut off")
    entries = parse_documents(read_small(table), TABLE, max_bytes=MAX_MANIFEST_BYTES, at_most=MAX_IMAGES)
    if not entries:
        raise InvalidArgument("the archive's manifest.json lists no image")
    return [_read_image(entry, intake, store) for entry in entries]


def read_small(file: StoredFile) -> bytes:
    """What may be parsed; a larger file is cut, which its parser refuses by size."""
    with file.path.open("rb") as opened:
        return opened.read(MAX_CONFIG_BYTES + 1)


def _read_image(entry: Document, intake: Intake, store: Store) -> FoundImage:
    config_file = _required(intake, entry.required_text("Config"))
    _check_name(entry.required_text("Config"), config_file)
    layer_files = [_required(intake, name) for name in entry.texts("Layers")]
    what = f"config {config_file.digest}"
    config = parse_config(read_small(config_file), what)
    manifest = Manifest(
        OCI_MANIFEST,
        Descriptor(OCI_CONFIG, config_file.digest, config_file.size_bytes),
        tuple(Descriptor(layer_type(file.path), file.digest, file.size_bytes) for file in layer_files),
    )
    details = make_details(manifest, config, f"image {config_file.digest}")
    made = store(_manifest_bytes(manifest))
    descriptor = Descriptor(OCI_MANIFEST, made.digest, made.size_bytes)
    names = tuple(parse_reference(name) for name in entry.texts("RepoTags"))
    found = FoundImage(names, descriptor, descriptor, details, {made.digest: made})
    for file in (config_file, *layer_files):
        found.blobs[file.digest] = file
        found.edges.add((made.digest, file.digest))
    return found


def _required(intake: Intake, name: str) -> StoredFile:
    file = intake.find("/".join(part for part in name.split("/") if part not in ("", ".")))
    if file is None:
        raise InvalidArgument(f"the archive lacks {name[:200]!r}, which its manifest.json names: it is incomplete")
    return file


def _check_name(name: str, file: StoredFile) -> None:
    match = _NAMED_BY_DIGEST.fullmatch(name)
    if match is not None and file.digest != PREFIX + match[1]:
        raise InvalidArgument(
            f"the archive's config {name!r} has the digest {file.digest}: it is damaged", reason="DIGEST_MISMATCH"
        )


def layer_type(path: Path) -> str:
    """The media type of a layer, by what it is compressed with."""
    with path.open("rb") as file:
        kind = detect(file.read(HEAD_BYTES))
    if kind not in _SUFFIX:
        raise BadLayer(
            f"a layer in it is compressed with {kind}, which no media type tells of: give it by gzip or zstd"
        )
    return OCI_LAYER + _SUFFIX[kind]


def _manifest_bytes(manifest: Manifest) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": manifest.media_type,
        "config": _as_json(manifest.config),
        "layers": [_as_json(layer) for layer in manifest.layers],
    }
    return json.dumps(document, indent=3).encode()


def _as_json(descriptor: Descriptor) -> dict[str, object]:
    return {"mediaType": descriptor.media_type, "size": descriptor.size_bytes, "digest": descriptor.digest}
