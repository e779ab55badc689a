"""gzip, zstd or plain, found out from the first bytes; decoded in pieces of bounded size, whatever the input claims.

zlib and zstandard release the GIL while they work.
"""

import zlib
from collections.abc import Iterator
from enum import StrEnum

import zstandard

from corral.images.layers.errors import BadLayer, Truncated

CHUNK_BYTES = 1 << 20
MAX_ZSTD_WINDOW_BYTES = 128 << 20  # what the zstd command takes without --long
HEAD_BYTES = 4

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_BZIP2 = b"BZh"
_XZ = b"\xfd7zX"


class Compression(StrEnum):
    PLAIN = ""
    GZIP = "gzip"
    ZSTD = "zstd"


def detect(head: bytes) -> Compression:
    """What data that begins with `head` (at least HEAD_BYTES, unless it is shorter) is. Raises BadLayer."""
    if head.startswith(_GZIP):
        return Compression.GZIP
    if head.startswith(_ZSTD) or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):  # or a skippable frame
        return Compression.ZSTD
    if head.startswith((_BZIP2, _XZ)):
        raise BadLayer("it is compressed with bzip2 or xz; corral reads gzip, zstd and plain tar")
    return Compression.PLAIN


def decompressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The plain data behind `chunks`, in pieces of at most CHUNK_BYTES if it was compressed. Raises BadLayer."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    kind = detect(head)
    if kind is Compression.GZIP:
        return _gunzip(_again(head, chunks))
    if kind is Compression.ZSTD:
        return _unzstd(_again(head, chunks))
    return _again(head, chunks)


def compressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """As gzip, with no time and no name in it: the same data gives the same bytes."""
    encoder = zlib.compressobj(wbits=31)
    for chunk in chunks:
        if packed := encoder.compress(chunk):
            yield packed
    yield encoder.flush()


def _again(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from rest


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Any number of gzip members; zero padding and anything else behind the last one is left unread, as gzip does."""
    decoder = zlib.decompressobj(wbits=31)
    fed = False
    for chunk in chunks:
        data = chunk
        while data:
            if decoder.eof:
                if not (data := data.lstrip(b"\0")) or not _GZIP.startswith(data[:2]):
                    break
                decoder, fed = zlib.decompressobj(wbits=31), False
            try:
                plain = decoder.decompress(data, CHUNK_BYTES)
            except zlib.error as e:
                raise BadLayer(f"its gzip data is corrupt: {e}") from e
            fed = True
            if plain:
                yield plain
            data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
    if not decoder.eof:
        # What zlib still holds back when the input is used up.
        yield from _gzip_rest(decoder)
    if fed and not decoder.eof:
        raise Truncated("its gzip data ends too early: it was cut off")


def _gzip_rest(decoder: "zlib._Decompress") -> Iterator[bytes]:
    try:
        while plain := decoder.decompress(b"", CHUNK_BYTES):
            yield plain
    except zlib.error as e:
        raise BadLayer(f"its gzip data is corrupt: {e}") from e


class _Reader:
    """What zstandard reads from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        data = self._rest or next(self._chunks, b"")
        self._rest = data[size:]
        return data[:size]


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Any number of frames. A frame that is cut off shows in the tar, or the digest, that ends too early."""
    decoder = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    reader = decoder.stream_reader(_Reader(chunks), read_size=CHUNK_BYTES, read_across_frames=True)  # type: ignore[arg-type]
    try:
        while plain := reader.read(CHUNK_BYTES):
            yield plain
    except zstandard.ZstdError as e:
        raise BadLayer(f"its zstd data is corrupt: {e}") from e
