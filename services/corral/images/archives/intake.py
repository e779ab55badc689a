"""An archive's files, each written once to a directory of its own and hashed as it comes.

An archive may hold its table of contents at its end, so everything is taken first and understood afterwards. What turns
out to be a blob is renamed to its place; the rest goes.
"""

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from corral.images.content import Ingest
from corral.images.digest import Digest, algorithm_of, digest_of_hex, hex_of
from corral.images.layers.bounds import bounded
from corral.images.layers.compression import as_layer, decompressed
from corral.images.layers.errors import BadLayer
from corral.images.layers.stream import ByteStream, prefetched
from corral.images.layers.tar import Entry, Kind, TarReader
from corral.images.layers.tree import components

MAX_FILES = 100_000
MAX_PEEK_BYTES = 8 << 20
MAX_LINKS = 10

# The first telling name of an archive that holds images. Others begin with a directory of a root file system.
_OF_AN_ARCHIVE = re.compile(
    r"oci-layout|index\.json|manifest\.json|repositories|config\.json|blobs/sha(?:256|512)/.+|layer\.tar|(?:.*/)?layer\.tar"
    r"|(?:sha256:)?[0-9a-f]{64}(?:/.*|\.json|\.tar|\.tar\.gz|\.tar\.zst)?"
)
_SAYS_NOTHING = frozenset({"", "blobs", "blobs/sha256", "blobs/sha512"})
_BLOB = re.compile(r"blobs/(sha256|sha512)/([0-9a-f]+)")


class StoredFile(NamedTuple):
    """A file of the archive, on disk and proven to be what its digest says."""

    path: Path
    digest: Digest
    size_bytes: int


@dataclass(slots=True)
class Intake:
    """What an archive held, by the names it has there."""

    files: dict[str, StoredFile] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> StoredFile | None:
        """The file of that name, or that a link of that name leads to."""
        for _ in range(MAX_LINKS):
            if name in self.files:
                return self.files[name]
            if name not in self.links:
                return None
            name = self.links[name]
        return None

    def blob(self, digest: Digest) -> StoredFile | None:
        return self.find(f"blobs/{algorithm_of(digest)}/{hex_of(digest)}")


def looks_like_archive(chunks: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Whether the stream is an archive of images (else it is a root file system), and the whole stream again.

    Raises BadLayer if it is no tar at all.
    """
    seen: list[bytes] = []
    size = 0

    def remembered() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            seen.append(chunk)
            size += len(chunk)
            yield chunk
            if size > MAX_PEEK_BYTES:
                return

    found = False
    for entry in TarReader(ByteStream(bounded(decompressed(remembered()), MAX_PEEK_BYTES))):
        name = "/".join(components(entry.name))
        if name not in _SAYS_NOTHING or entry.kind is not Kind.DIRECTORY:
            found = _OF_AN_ARCHIVE.fullmatch(name) is not None
            break
    return found, chain(seen, chunks)


def take_in(chunks: Iterator[bytes], directory: Path, *, max_bytes: int) -> Intake:
    """Write the files of an archive of images below `directory`. Raises BadLayer, OSError.

    max_bytes: of the whole archive, decompressed.
    """
    intake = Intake()
    with closing(prefetched(bounded(decompressed(chunks), max_bytes))) as plain:
        stream = ByteStream(plain)
        reader = TarReader(stream)
        for number, entry in enumerate(reader):
            if number >= MAX_FILES:
                raise BadLayer(f"it has more than {MAX_FILES} files")
            _take_entry(entry, reader, intake, directory / str(number))
        stream.drain()
    return intake


def _take_entry(entry: Entry, reader: TarReader, intake: Intake, path: Path) -> None:
    parts = components(entry.name)
    name = "/".join(parts)
    if entry.kind is Kind.FILE:
        intake.links.pop(name, None)
        if (old := intake.files.pop(name, None)) is not None:
            old.path.unlink()
        intake.files[name] = _store(reader, path, _digest_named(name))
    elif entry.kind in (Kind.SYMLINK, Kind.HARDLINK):
        # docker save once wrote a layer that two images share as a link, "../<id>/layer.tar".
        intake.links[name] = _link_target(entry, parts)


def _link_target(entry: Entry, parts: list[str]) -> str:
    target = entry.link.decode("utf-8", "replace")
    resolved = [] if entry.kind is Kind.HARDLINK or target.startswith("/") else parts[:-1]
    for part in target.split("/"):
        if part == "..":
            resolved = resolved[:-1]
        elif part not in ("", "."):
            resolved = [*resolved, part]
    return "/".join(resolved)


def _digest_named(name: str) -> Digest | None:
    """Of a blob, which its name promises."""
    match = _BLOB.fullmatch(name)
    digest = digest_of_hex(match[2]) if match else None
    return digest if match and digest and algorithm_of(digest) == match[1] else None


def _store(reader: TarReader, path: Path, blob: Digest | None) -> StoredFile:
    ingest = Ingest(path, blob or "")
    try:
        for view in reader.payload():
            ingest.write(view)
    finally:
        ingest.close()
    if blob and ingest.digest != blob:
        raise BadLayer(f"its blob {blob} has other content ({ingest.digest}): it is damaged")
    return StoredFile(path, ingest.digest, ingest.size_bytes)


def take_whole(chunks: Iterator[bytes], path: Path, *, max_bytes: int) -> StoredFile:
    """Write a root file system's archive, as a layer can be. Raises BadLayer, OSError."""
    ingest = Ingest(path)
    try:
        for chunk in bounded(as_layer(chunks), max_bytes):
            ingest.write(chunk)
    finally:
        ingest.close()
    return StoredFile(path, ingest.digest, ingest.size_bytes)
