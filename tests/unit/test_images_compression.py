"""gzip, zstd and plain, whole and damaged."""

import bz2
import gzip
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from corral.images.layers.compression import CHUNK_BYTES, Compression, decompressed, detect
from corral.images.layers.errors import BadLayer, Truncated


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def plain(data: bytes, size: int = 4096) -> bytes:
    return b"".join(decompressed(pieces(data, size)))


PACKERS = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}


@pytest.mark.parametrize("packer", PACKERS)
@given(data=st.binary(max_size=5000), size=st.integers(1, 6000))
def test_data_comes_back_in_pieces_of_any_size(packer: str, data: bytes, size: int) -> None:
    packed = b"plain" + data if packer == "plain" else PACKERS[packer](data)
    assert plain(packed, size) == (packed if packer == "plain" else data)


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
@pytest.mark.parametrize("size", [1, 3, 4096])
def test_several_members_are_one_stream(packer: str, size: int) -> None:
    pack = PACKERS[packer]
    assert plain(pack(b"one") + pack(b"") + pack(b"two"), size) == b"onetwo"


def test_zeros_behind_gzip_data_are_passed_over() -> None:
    assert plain(gzip.compress(b"data") + bytes(5000)) == b"data"


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


def test_other_compressions_are_refused_by_name() -> None:
    with pytest.raises(BadLayer, match="bzip2 or xz"):
        plain(bz2.compress(b"x"))


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
def test_a_bomb_costs_no_memory(packer: str) -> None:
    """400 MB of zeros, from a few kilobytes: they come in pieces of a mebibyte."""
    zeros = bytes(1 << 20)
    if packer == "gzip":
        import zlib

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
