"""What an archive turns out to hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from corral.images.archives.intake import StoredFile
from corral.images.details import Details
from corral.images.digest import Digest
from corral.images.model import Descriptor
from corral.images.reference import Reference


@dataclass(slots=True)
class FoundImage:
    """An image, understood and in itself consistent."""

    names: tuple[Reference, ...]
    target: Descriptor
    manifest: Descriptor
    details: Details
    # Every blob that is to be stored with it, and which refers to which.
    blobs: dict[Digest, StoredFile] = field(default_factory=dict)
    edges: set[tuple[Digest, Digest]] = field(default_factory=set)

    @property
    def image_id(self) -> Digest:
        return self.details.manifest.config.digest


def blob_paths(images: list[FoundImage]) -> Mapping[Digest, Path]:
    return {digest: file.path for image in images for digest, file in image.blobs.items()}
