"""gzip, zstd, xz, bzip2 or plain, found out from the first bytes; decoded in pieces of bounded size, whatever the input
claims. No media type of a layer tells of xz and bzip2: docker takes them for archives, and so do we.

isal and zstandard release the GIL while they work. isal takes half as long as zlib to decode gzip. Nothing is
encoded by it: what zlib makes is smaller, and the same on every processor.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from enum import StrEnum

import zstandard
from isal import isal_zlib

from corral.images.layers.errors import BadLayer, Truncated

CHUNK_BYTES = 1 << 19  # less is more calls, more does not stay in a processor's cache
MAX_ZSTD_WINDOW_BYTES = 128 << 20  # what the zstd command takes without --long
HEAD_BYTES = 4

MAX_GZIP_HEADER_BYTES = 1 << 17  # its name and comment may be of any length; honest ones are short

_GZIP = b"\x1f\x8b"
_BARE_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_DEFLATE = 8
_HEADER_CRC, _EXTRA, _NAME, _COMMENT, _RESERVED = 0x02, 0x04, 0x08, 0x10, 0xE0
_ZSTD = b"\x28\xb5\x2f\xfd"
_BZIP2 = b"BZh"
_XZ = b"\xfd7zX"
MAX_XZ_MEMORY_BYTES = 128 << 20  # xz -9 takes 65 MiB


class Compression(StrEnum):
    PLAIN = ""
    GZIP = "gzip"
    ZSTD = "zstd"
    BZIP2 = "bzip2"
    XZ = "xz"


def detect(head: bytes) -> Compression:
    """What data that begins with `head` (at least HEAD_BYTES, unless it is shorter) is."""
    if head.startswith(_GZIP):
        return Compression.GZIP
    if head.startswith(_ZSTD) or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):  # or a skippable frame
        return Compression.ZSTD
    if head.startswith(_BZIP2):
        return Compression.BZIP2
    return Compression.XZ if head.startswith(_XZ) else Compression.PLAIN


def decompressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The plain data behind `chunks`, in pieces of at most CHUNK_BYTES if it was compressed. Raises BadLayer."""
    kind, chunks = _looked_at(chunks)
    if kind is Compression.GZIP:
        return _gunzip(chunks)
    if kind is Compression.ZSTD:
        return _unzstd(chunks)
    return chunks if kind is Compression.PLAIN else _unpacked(kind, chunks)


def as_layer(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """As they are, if a media type can tell how they are compressed, else the plain data. Raises BadLayer."""
    kind, chunks = _looked_at(chunks)
    return _unpacked(kind, chunks) if kind in (Compression.BZIP2, Compression.XZ) else chunks


def _looked_at(chunks: Iterator[bytes]) -> tuple[Compression, Iterator[bytes]]:
    """What they are, and all of them again."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    return detect(head), _again(head, chunks)


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
    decoder: isal_zlib.Decompress | None = None
    members, data = 0, b""
    for chunk in chunks:
        data += chunk
        while data:
            if decoder is None:
                if members and not (data := data.lstrip(b"\0")):
                    break
                if members and not _GZIP.startswith(data[:2]):
                    deque(chunks, maxlen=0)  # who sends them does not wait for us then
                    return
                if not (end := gzip_header_end(data)):
                    break
                decoder, members, data = isal_zlib.decompressobj(wbits=31), members + 1, _BARE_HEADER + data[end:]
            if plain := _decoded(decoder, data):
                yield plain
            data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            decoder = None if decoder.eof else decoder
    while decoder is not None and (plain := _decoded(decoder, b"")):  # what it still holds back
        yield plain
        decoder = None if decoder.eof else decoder
    if decoder is not None or data:
        raise Truncated("its gzip data ends too early: it was cut off")


def _decoded(decoder: "isal_zlib.Decompress", data: bytes) -> bytes:
    """Raises BadLayer."""
    try:
        return decoder.decompress(data, CHUNK_BYTES)
    except isal_zlib.IsalError as e:  # type: ignore[misc]  # typed as an exception, not as a kind of one
        raise BadLayer(f"its gzip data is corrupt: {e}") from e


def gzip_header_end(data: bytes) -> int:
    """Where the header of the gzip member ends that `data` begins with; 0 if it goes on behind. Raises BadLayer.

    isal is given a header without optional fields instead: it loses its way where one with several comes in pieces.
    Source: RFC 1952, 2.3.
    """
    if len(data) >= 4 and (data[2] != _DEFLATE or data[3] & _RESERVED):
        raise BadLayer("its gzip data is corrupt: the header of a member has unknown features")
    if len(data) > MAX_GZIP_HEADER_BYTES:
        data = data[:MAX_GZIP_HEADER_BYTES]
    end, flags = len(_BARE_HEADER), data[3] if len(data) > 3 else 0
    if flags & _EXTRA:
        end += 2 + int.from_bytes(data[end : end + 2], "little")
    for text in (_NAME, _COMMENT):
        if flags & text and end <= len(data):
            end = data.find(0, end) + 1 or len(data) + 1
    if flags & _HEADER_CRC:
        end += 2
    if end <= len(data):
        return end
    if len(data) == MAX_GZIP_HEADER_BYTES:
        raise BadLayer(f"its gzip data is corrupt: the header of a member has more than {MAX_GZIP_HEADER_BYTES} bytes")
    return 0


def _unpacked(kind: Compression, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Any number of streams of xz or bzip2; what is behind the last one is left unread."""
    import bz2  # both are seldom wanted
    import lzma

    def begin() -> "bz2.BZ2Decompressor | lzma.LZMADecompressor":
        if kind is Compression.BZIP2:
            return bz2.BZ2Decompressor()
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY_BYTES)

    decoder = begin()
    for data in chunks:
        while data or not (decoder.eof or decoder.needs_input):
            if decoder.eof:
                if not (data := data.lstrip(b"\0")):
                    break
                if not data.startswith((_BZIP2, _XZ)[kind is Compression.XZ][: len(data)]):
                    deque(chunks, maxlen=0)  # who sends them does not wait for us then
                    return
                decoder = begin()
            try:
                plain = decoder.decompress(data, CHUNK_BYTES)
            except (OSError, ValueError, lzma.LZMAError) as e:
                raise BadLayer(f"its {kind} data is corrupt: {e}") from e
            if plain:
                yield plain
            data = decoder.unused_data if decoder.eof else b""
    if not decoder.eof:
        raise Truncated(f"its {kind} data ends too early: it was cut off")


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
