"""An OCI image layout as a tar.

    oci-layout            {"imageLayoutVersion": "1.0.0"}
    index.json            descriptors of manifests and indexes, named by annotations
    blobs/<algorithm>/<hex>

Source: OCI image-spec image-layout.md; the annotation io.containerd.image.name as docker and containerd write it.
"""

from collections.abc import Iterator, Mapping

from corral.images.archives.docker import read_small
from corral.images.archives.found import FoundImage
from corral.images.archives.intake import Intake, StoredFile
from corral.images.details import Details, make_details
from corral.images.digest import Digest
from corral.images.document import parse_document
from corral.images.model import (
    MANIFESTS,
    OCI_INDEX,
    Descriptor,
    Index,
    Manifest,
    Platform,
    parse_config,
    parse_index,
    parse_manifest_or_index,
)
from corral.images.platforms import choose
from corral.images.reference import Reference, parse_reference
from corral.rpc.errors import InvalidArgument, NotFound

LAYOUT = "oci-layout"
INDEX = "index.json"
FULL_NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
MAX_DEPTH = 4
MAX_NODES = 10_000


def read_oci_archive(intake: Intake, platform: Platform) -> list[FoundImage]:
    """The images of a layout. From an index the manifest for `platform` is taken. Raises InvalidArgument, NotFound."""
    _check_layout(intake)
    top = intake.find(INDEX)
    if top is None:
        raise InvalidArgument("the archive has no index.json: it is not an OCI layout, or it was cut off")
    index = parse_index(read_small(top), INDEX)
    if not index.manifests:
        raise InvalidArgument("the archive's index.json lists no image")
    reader = _Reader(intake, platform)
    if _is_one_image(index):
        return [reader.image(Descriptor(OCI_INDEX, top.digest, top.size_bytes), (), {top.digest: top})]
    found: dict[Digest, FoundImage] = {}
    for descriptor in index.manifests:
        names = _names(descriptor)
        if descriptor.digest in found:
            found[descriptor.digest].names += names
        else:
            found[descriptor.digest] = reader.image(descriptor, names, {})
    return list(found.values())


def _check_layout(intake: Intake) -> None:
    file = intake.find(LAYOUT)
    if file is not None:
        version = parse_document(read_small(file), LAYOUT, max_bytes=4096).text("imageLayoutVersion")
        if version.split(".")[0] != "1":
            raise InvalidArgument(f"the archive is an OCI layout of version {version[:20]!r}; corral reads 1.x")


def _is_one_image(index: Index) -> bool:
    """Several nameless manifests for different platforms are one image: the index itself."""
    manifests = index.manifests
    platforms = {descriptor.platform for descriptor in manifests}
    return (
        len(manifests) > 1
        and len(platforms) == len(manifests)
        and None not in platforms
        and all(not _names(descriptor) and descriptor.media_type in MANIFESTS for descriptor in manifests)
    )


def _names(descriptor: Descriptor) -> tuple[Reference, ...]:
    """A bare word in ref.name is only a tag: it does not say of what."""
    full = descriptor.annotations.get(FULL_NAME) or descriptor.annotations.get(REF_NAME, "")
    return (parse_reference(full),) if "/" in full or ":" in full else ()


class _Reader:
    """Follows descriptors through the archive's blobs."""

    def __init__(self, intake: Intake, platform: Platform) -> None:
        self._intake = intake
        self._platform = platform

    def image(self, target: Descriptor, names: tuple[Reference, ...], blobs: Mapping[Digest, StoredFile]) -> FoundImage:
        self._blobs = dict(blobs)
        manifest_descriptor, details = self._choose(target, depth=0)
        found = FoundImage(names, target, manifest_descriptor, details, self._blobs)
        self._followed: set[Digest] = set()
        for edge in self._edges(target, depth=0):
            found.edges.add(edge)
            if len(found.edges) > MAX_NODES:
                raise InvalidArgument(f"image {target.digest} refers to more than {MAX_NODES} blobs")
        missing = [layer.digest for layer in details.manifest.layers if layer.digest not in self._blobs]
        if missing:
            raise InvalidArgument(f"the archive lacks layer {missing[0]} of image {target.digest}: it is incomplete")
        return found

    def _choose(self, target: Descriptor, *, depth: int) -> tuple[Descriptor, Details]:
        document = self._document(target)
        if isinstance(document, Manifest):
            config = self._file(document.config)
            what = f"config {document.config.digest}"
            return target, make_details(document, parse_config(read_small(config), what), f"image {target.digest}")
        if depth >= MAX_DEPTH:
            raise InvalidArgument(f"image {target.digest} has indexes nested more than {MAX_DEPTH} deep")
        chosen = choose(document.manifests, self._platform)
        if chosen is None:
            offered = ", ".join(sorted({str(m.platform) for m in document.manifests if m.platform})) or "none"
            raise NotFound(
                f"image {target.digest} has nothing for {self._platform}; it offers {offered}: choose with --platform",
                reason="NO_PLATFORM",
            )
        return self._choose(chosen, depth=depth + 1)

    def _edges(self, target: Descriptor, *, depth: int) -> Iterator[tuple[Digest, Digest]]:
        """All references below `target`, as far as the archive holds them, each blob noted on the way."""
        if target.digest in self._followed:
            return
        self._followed.add(target.digest)
        document = self._document(target)
        if isinstance(document, Manifest):
            children: tuple[Descriptor, ...] = (document.config, *document.layers)
        else:
            children = document.manifests if depth < MAX_DEPTH else ()
        for child in children:
            file = self._intake.blob(child.digest)
            if file is None:
                continue
            _check_size(child, file)
            self._blobs[child.digest] = file
            yield target.digest, child.digest
            if isinstance(document, Index):
                yield from self._edges(child, depth=depth + 1)

    def _document(self, descriptor: Descriptor) -> Manifest | Index:
        file = self._file(descriptor)
        what = f"manifest {descriptor.digest}"
        return parse_manifest_or_index(read_small(file), what, media_type=descriptor.media_type)

    def _file(self, descriptor: Descriptor) -> StoredFile:
        file = self._blobs.get(descriptor.digest) or self._intake.blob(descriptor.digest)
        if file is None:
            raise InvalidArgument(f"the archive lacks blob {descriptor.digest}: it is incomplete")
        _check_size(descriptor, file)
        self._blobs[descriptor.digest] = file
        return file


def _check_size(descriptor: Descriptor, file: StoredFile) -> None:
    if descriptor.size_bytes != file.size_bytes:
        raise InvalidArgument(
            f"blob {descriptor.digest} has {file.size_bytes} bytes, but its descriptor says {descriptor.size_bytes}",
            reason="SIZE_MISMATCH",
        )
