"""A layer's blob, told by what it can be made of again: byte for byte, or not at all.

    one line of JSON    how it is compressed
    then, as zstd       records, which put together are the tar:
        RAW  <length> <bytes>                headers, padding, and what is not in the tree as it was in the tar
        FILE <length> <name>                 so much of the beginning of a file of the unpacked layer
        END

Most of a tar is the content of files, which the unpacked layer has too. What compressed it has to be found out: zlib is
tried at each of its levels. A recipe counts only when the blob has been made by it once, with the same digest.
"""

import json
import os
import struct
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from corral.images.layers.compression import (
    CHUNK_BYTES,
    MAX_GZIP_HEADER_BYTES,
    Compression,
    decompressed,
    detect,
    gzip_header_end,
)
from corral.images.layers.errors import BadLayer
from corral.images.layers.stream import ByteStream
from corral.images.layers.tar import Kind, TarReader
from corral.kernel.paths import RESOLVE_NO_SYMLINKS, open_in_root

VERSION = 1
MIN_FILE_BYTES = 256  # what is smaller is not worth its name
LEVELS = (6, 9, 1, 5, 7, 8, 4, 3, 2)
MEMORY_LEVELS = (8, 9)

_RECORD = struct.Struct("<cQI")
_RAW, _FILE, _END = b"R", b"F", b"E"
_MAX_HEADER_LINE = 1 << 19

type Region = tuple[int, int, bytes]  # where a file's content begins in the tar, its size, its name


@dataclass(frozen=True, slots=True)
class Way:
    """How a blob is compressed. gzip: its header as it is, and two numbers of zlib's."""

    kind: Compression
    header: bytes = b""
    level: int = 0
    memory_level: int = 0

    def to_json(self) -> dict[str, object]:
        numbers = {"level": self.level, "memory_level": self.memory_level}
        return {"version": VERSION, "kind": str(self.kind), "header": self.header.hex(), **numbers}

    @classmethod
    def from_json(cls, line: bytes) -> "Way":
        """Raises ValueError, KeyError, TypeError."""
        told = json.loads(line)
        if told["version"] != VERSION:
            raise ValueError(f"version {told['version']}")
        return cls(Compression(told["kind"]), bytes.fromhex(told["header"]), told["level"], told["memory_level"])

    def applied(self, plain: Iterator[bytes]) -> Iterator[bytes]:
        """The blob's bytes."""
        if self.kind is Compression.PLAIN:
            yield from plain
            return
        deflate = zlib.compressobj(self.level, zlib.DEFLATED, -15, self.memory_level)
        size = checksum = 0
        yield self.header
        for chunk in plain:
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
            if packed := deflate.compress(chunk):
                yield packed
        yield deflate.flush()
        yield struct.pack("<II", checksum, size & 0xFFFF_FFFF)  # RFC 1952, 2.3.1


def find_way(blob: Path) -> Way | None:
    """How the blob was compressed; None if nothing here compresses like that."""
    with blob.open("rb") as file:
        head = file.read(MAX_GZIP_HEADER_BYTES)
    kind = detect(head[:4])
    if kind is Compression.PLAIN:
        return Way(kind)
    end = gzip_header_end(head) if kind is Compression.GZIP else 0
    if not end:
        return None
    ways = (Way(kind, head[:end], level, memory_level) for memory_level in MEMORY_LEVELS for level in LEVELS)
    return next((way for way in ways if _is_way_of(way, blob)), None)


def _is_way_of(way: Way, blob: Path) -> bool:
    """Whether it makes the very same bytes. Wrong ones differ soon, as a rule."""
    with blob.open("rb") as file, closing(_plain(blob)) as plain:
        return all(file.read(len(made)) == made for made in way.applied(plain)) and not file.read(1)


def _plain(blob: Path) -> Generator[bytes]:
    with blob.open("rb") as file:
        yield from decompressed(iter(lambda: file.read(CHUNK_BYTES), b""))


def write(blob: Path, root: int, target: Path, facts: Mapping[str, str | int]) -> bool:
    """Write to `target` how `blob` is made again out of the layer whose root is open; False if that cannot be told.

    facts: to be found by read_facts().
    """
    way = find_way(blob)
    if way is None:
        return False
    regions = _regions(blob)
    with target.open("xb") as file:
        file.write(json.dumps({**facts, **way.to_json()}).encode() + b"\n")
        with zstandard.ZstdCompressor(level=9).stream_writer(file, closefd=False) as out:
            _Splitter(out, root).split(_plain(blob), regions)
    return True


def _regions(blob: Path) -> list[Region]:
    with closing(_plain(blob)) as plain:
        stream = ByteStream(plain)
        return [
            (stream.offset, entry.size, entry.name)
            for entry in TarReader(stream, needs_end=False)
            if entry.kind is Kind.FILE and entry.extents is None and entry.size >= MIN_FILE_BYTES
        ]


class _Splitter:
    """Writes records."""

    def __init__(self, out: "zstandard.ZstdCompressionWriter", root: int) -> None:
        self._out = out
        self._root = root

    def split(self, plain: Iterator[bytes], regions: list[Region]) -> None:
        stream, offset = ByteStream(plain), 0
        for start, size, name in regions:
            self._raw(stream, start - offset)
            self._content(stream, size, name)
            offset = start + size
        while rest := b"".join(map(bytes, stream.views(CHUNK_BYTES, may_end=True))):
            self._record_raw(rest)
        self._out.write(_RECORD.pack(_END, 0, 0))

    def _raw(self, stream: ByteStream, size: int) -> None:
        for view in stream.views(size):
            self._record_raw(bytes(view))

    def _record_raw(self, data: bytes) -> None:
        if data:
            self._out.write(_RECORD.pack(_RAW, len(data), 0) + data)

    def _content(self, stream: ByteStream, size: int, name: bytes) -> None:
        """As long as the file in the tree says the same, it is told by its name."""
        same, differs = 0, False
        file = _opened(self._root, name)
        try:
            for view in stream.views(size):
                data = bytes(view)
                if not differs and (file is None or file.read(len(data)) != data):
                    self._record_file(same, name)
                    differs = True
                if differs:
                    self._record_raw(data)
                else:
                    same += len(data)
        finally:
            if file is not None:
                file.close()
        if not differs:
            self._record_file(same, name)

    def _record_file(self, size: int, name: bytes) -> None:
        if size:
            self._out.write(_RECORD.pack(_FILE, size, len(name)) + name)


def _opened(root: int, name: bytes) -> BinaryIO | None:
    """A file of the layer; None if there is none of that name any more. Never through a link that the layer has."""
    with suppress(OSError, ValueError):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = open_in_root(root, os.fsdecode(name), flags, resolve=RESOLVE_NO_SYMLINKS)
        return open(fd, "rb")
    return None


def read_facts(recipe: Path) -> Mapping[str, object]:
    """Of a recipe that may be damaged: empty then. Raises OSError."""
    with recipe.open("rb") as file:
        try:
            told = json.loads(file.readline(_MAX_HEADER_LINE))
        except ValueError:
            return {}
    return told if isinstance(told, dict) else {}


def remade(recipe: Path, root: int) -> Iterator[bytes]:
    """The blob's bytes. Raises BadLayer, OSError."""
    with recipe.open("rb") as file:
        line = file.readline(_MAX_HEADER_LINE)
        try:
            way = Way.from_json(line)
        except (ValueError, KeyError, TypeError) as e:
            raise BadLayer(f"the recipe {recipe.name} is not understood: {e}") from e
        with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as records:
            yield from way.applied(_tar(records, root))


def _tar(records: "zstandard.ZstdDecompressionReader", root: int) -> Iterator[bytes]:
    while True:
        kind, size, name_size = _RECORD.unpack(_exactly(records, _RECORD.size))
        if kind == _END:
            return
        if kind == _RAW:
            yield _exactly(records, size)
        else:
            yield from _beginning(root, _exactly(records, name_size), size)


def _exactly(records: "zstandard.ZstdDecompressionReader", size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = records.read(size - len(data))
        if not more:
            raise BadLayer("the recipe ends too early: it was cut off")
        data += more
    return data


def _beginning(root: int, name: bytes, size: int) -> Iterator[bytes]:
    file = _opened(root, name)
    if file is None:
        raise BadLayer(f"the layer has lost its file {os.fsdecode(name)!r}")
    with file:
        while size:
            data = file.read(min(size, CHUNK_BYTES))
            if not data:
                raise BadLayer(f"the layer's file {os.fsdecode(name)!r} was cut off")
            size -= len(data)
            yield data
