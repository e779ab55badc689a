"""What a case is."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Bounds that the leaf of every case is started with, small enough for bombs to be small.
MAX_BYTES = 24 << 20
MAX_ENTRIES = 5_000
MAX_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Blob:
    """A layer as it is stored, and the digest that the image's config has for what is in it."""

    data: bytes
    diff_id: str


def plain(data: bytes) -> Blob:
    return Blob(data, f"sha256:{hashlib.sha256(data).hexdigest()}")


def packed(stored: bytes, data: bytes) -> Blob:
    """stored: `data`, compressed."""
    return Blob(stored, plain(data).diff_id)


# Given the canary: a directory outside of everything, with a file `kept` in it. The layers, the lowest first.
type Build = Callable[[Path], Sequence[bytes | Blob]]
# Given the root as a container would see it, and the canary. Asserts what must be true of it.
type Check = Callable[[Path, Path], None]


def nothing(_root: Path, _canary: Path) -> None:
    """It is enough that nothing else has changed."""


@dataclass(frozen=True, slots=True)
class Case:
    """Layers that somebody made who means no good."""

    name: str
    build: Build
    # Words of the sentence that refuses it; empty: it is contained.
    refused: str = ""
    check: Check = nothing
    # Where a plain root file system, which no digest vouches for, is refused though an image is not.
    refused_as_rootfs: str = ""
    # It makes sense in a layer above another one only.
    has_below: bool = False


@dataclass(frozen=True, slots=True)
class ArchiveCase:
    """An archive as it comes. Given the canary."""

    name: str
    build: Callable[[Path], bytes]
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Documents:
    """An image as a registry or a layout has it: blobs by digest, and what the name means."""

    blobs: Mapping[str, bytes]
    target: bytes
    media_type: str
    # Descriptor fields that differ from what is true, in a layout's index alone.
    lies: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DocumentCase:
    """An image whose manifest, index or config is the matter. Given an address at which nothing may be asked for."""

    name: str
    build: Callable[[str], Documents]
    refused: str
    # The registry itself does not take it, so that only an archive can bring it.
    archive_only: bool = False
    # The words where they are others for a pull.
    refused_pull: str = ""
