"""gzip, zstd and plain, whole and damaged."""

import bz2
import gzip
import lzma
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.images.layers.compression import CHUNK_BYTES, Compression, as_layer, decompressed, detect
from corral.images.layers.errors import BadLayer, Truncated


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def plain(data: bytes, size: int = 4096) -> bytes:
    return b"".join(decompressed(pieces(data, size)))


PACKERS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
}


@pytest.mark.parametrize("packer", PACKERS)
@given(data=st.binary(max_size=5000), size=st.integers(1, 6000))
def test_data_comes_back_in_pieces_of_any_size(packer: str, data: bytes, size: int) -> None:
    packed = b"plain" + data if packer == "plain" else PACKERS[packer](data)
    assert plain(packed, size) == (packed if packer == "plain" else data)


@pytest.mark.parametrize("packer", ["gzip", "zstd", "bzip2", "xz"])
@pytest.mark.parametrize("size", [1, 3, 4096])
def test_several_members_are_one_stream(packer: str, size: int) -> None:
    pack = PACKERS[packer]
    assert plain(pack(b"one") + pack(b"") + pack(b"two"), size) == b"onetwo"


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "xz"])
def test_zeros_and_what_is_no_member_are_passed_over_behind_one(packer: str) -> None:
    packed = PACKERS[packer](b"data")
    assert plain(packed + bytes(5000)) == b"data"
    assert plain(packed + b"else", 5) == b"data"


def test_what_no_media_type_tells_of_is_no_layer_as_it_is() -> None:
    for packer, is_kept in (("plain", True), ("gzip", True), ("zstd", True), ("bzip2", False), ("xz", False)):
        packed = PACKERS[packer](b"some data")
        assert b"".join(as_layer(pieces(packed, 3))) == (packed if is_kept else b"some data")


def test_a_zstd_frame_that_says_nothing_is_passed_over() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    assert detect(skippable) is Compression.ZSTD
    assert plain(skippable + zstandard.compress(b"data")) == b"data"


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_cut_gzip_data_is_truncated(cut: float) -> None:
    packed = gzip.compress(bytes(range(256)) * 500)
    with pytest.raises(Truncated):
        plain(packed[: int(len(packed) * cut)])


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
def test_damaged_data_is_refused(packer: str) -> None:
    # Data that can be compressed: what cannot is stored as it is, and damage to it only shows in a digest.
    packed = bytearray(PACKERS[packer](str(list(range(50_000))).encode()))
    for i in range(20, len(packed), 50):
        packed[i] ^= 0xFF
    with pytest.raises(BadLayer, match="corrupt"):
        plain(bytes(packed))


@pytest.mark.parametrize("packer", ["bzip2", "xz"])
def test_other_compressions_are_refused_where_they_are_damaged(packer: str) -> None:
    packed = bytearray(PACKERS[packer](bytes(range(256)) * 500))
    with pytest.raises(Truncated):
        plain(bytes(packed[:-5]))
    packed[len(packed) // 2] ^= 0xFF
    with pytest.raises(BadLayer, match=f"{packer} data is corrupt"):
        plain(bytes(packed))


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
def test_a_bomb_costs_no_memory(packer: str) -> None:
    """400 MB of zeros, from a few kilobytes: they come in small pieces."""
    zeros = bytes(1 << 20)
    if packer == "gzip":
        compressor = zlib.compressobj(9, wbits=31)
        bomb = b"".join(compressor.compress(zeros) for _ in range(400)) + compressor.flush()
    else:
        writer = zstandard.ZstdCompressor().compressobj()
        bomb = b"".join(writer.compress(zeros) for _ in range(400)) + writer.flush()
    tracemalloc.start()
    total = 0
    for piece in decompressed(iter([bomb])):
        assert len(piece) <= CHUNK_BYTES
        total += len(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 400 << 20
    assert peak < 16 << 20


def gzip_with_header(data: bytes, flags: int, *, extra: bytes = b"", text: bytes = b"") -> bytes:
    """A member with optional fields. Source: RFC 1952, 2.3."""
    header = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\2\3"
    header += len(extra).to_bytes(2, "little") + extra if flags & 4 else b""
    header += (text + b"\0") * ((flags >> 3 & 1) + (flags >> 4 & 1))
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little") if flags & 2 else b""
    return header + gzip.compress(data, mtime=0)[10:]


@pytest.mark.parametrize("flags", [1, 2, 4, 8, 16, 2 | 8, 4 | 8, 4 | 8 | 16, 2 | 4 | 8 | 16])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 50, 100_000])
def test_what_a_gzip_header_may_hold_is_passed_over_in_pieces_of_any_size(flags: int, size: int) -> None:
    data = str(list(range(300))).encode()
    member = gzip_with_header(data, flags, extra=b"BC\2\0\7\0" * 9, text=b"layer.tar")
    assert plain(member * 3, size) == data * 3


def test_a_gzip_header_that_never_ends_is_refused() -> None:
    def endless() -> Iterator[bytes]:
        yield gzip_with_header(b"", 8)[:10]
        while True:
            yield b"n" * 65536

    with pytest.raises(BadLayer, match="more than"):
        next(decompressed(endless()))


@pytest.mark.parametrize("header", [b"\x1f\x8b\x07\0", b"\x1f\x8b\x08\x20"])
def test_a_gzip_header_with_unknown_features_is_refused(header: bytes) -> None:
    with pytest.raises(BadLayer, match="unknown features"):
        plain(header + gzip.compress(b"data")[4:])


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("position", [-1, -4, -5, -8])
def test_a_wrong_checksum_or_length_of_gzip_data_is_refused(position: int, size: int) -> None:
    packed = bytearray(gzip.compress(b"data" * 1000))
    packed[position] ^= 1
    with pytest.raises(BadLayer, match="corrupt"):
        plain(bytes(packed), size)


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("more", [b"junk", b"\0\0junk", b"\0\0\0"])
def test_what_is_no_member_behind_gzip_data_is_left_unread(more: bytes, size: int) -> None:
    assert plain(gzip.compress(b"data") + more * 3, size) == b"data"


@settings(max_examples=300, deadline=None)
@given(
    data=st.lists(st.tuples(st.binary(max_size=40), st.integers(1, 4000)), max_size=30),
    level=st.integers(0, 9),
    strategy=st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED]),
    size=st.integers(1, 70_000),
)
def test_all_that_zlib_writes_is_read(data: list[tuple[bytes, int]], level: int, strategy: int, size: int) -> None:
    whole = b"".join(part * times for part, times in data)
    encoder = zlib.compressobj(level, wbits=31, strategy=strategy)
    assert plain(encoder.compress(whole) + encoder.flush(), size) == whole
