"""Sizes, numbers and maps of sparse files that are not true, and bombs."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import zstandard

from support.hostile.case import MAX_BYTES, MAX_ENTRIES, Blob, Case, packed, plain
from support.images import Entry, directory, layer
from support.tars import BLOCK, END, archive, header, member, pax, pax_record

TIB = 1 << 40


def _raw(*members: bytes) -> Callable[[Path], list[bytes]]:
    return lambda _canary: [archive(*members)]


def base256(value: int) -> bytes:
    """A size as GNU tar writes large and negative ones."""
    return (value & ((1 << 96) - 1) | 1 << 95).to_bytes(12, "big")


def gnu_sparse(extents: list[tuple[int, int]], size: int, data: bytes = b"", *, more: bool = False) -> bytes:
    """A file in GNU tar's old form of sparse; `more`: it promises a block of extents that does not come."""
    block = bytearray(header(b"s", kind=b"S", size=len(data)))
    for i, (offset, length) in enumerate(extents):
        struct.pack_into("12s12s", block, 386 + 24 * i, _octal(offset), _octal(length))
    block[482] = more
    struct.pack_into("12s", block, 483, _octal(size))
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % BLOCK)


def _octal(value: int) -> bytes:
    return b"%011o\0" % value if 0 <= value < 1 << 33 else base256(value)


def pax_sparse(numbers: bytes, data: bytes, *, size: int = 100, stored: int | None = None) -> bytes:
    """A file in the form 1.0: the map, as decimal lines, and then what it tells of."""
    body = numbers + bytes(-len(numbers) % BLOCK) + data
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"%d" % size}
    return pax(records) + member(b"s", body, size=len(body) if stored is None else base256(stored))


def _listed(numbers: bytes, data: bytes, size: int = 100) -> bytes:
    """In the form 0.1."""
    return pax({b"GNU.sparse.size": b"%d" % size, b"GNU.sparse.map": numbers}) + member(b"s", data)


def _bomb(pack: Callable[[bytes], bytes]) -> Callable[[Path], list[Blob]]:
    def build(_canary: Path) -> list[Blob]:
        data = archive(member(b"f", bytes(4 * MAX_BYTES)))
        return [packed(pack(data), data)]

    return build


def _tail_bomb(_canary: Path) -> list[Blob]:
    """The bomb comes after the end mark, where nothing is unpacked any more."""
    data = archive(member(b"f", b"x")) + bytes(2 * MAX_BYTES)
    return [packed(gzip.compress(data, 9), data)]


def _passed_over_bomb(_canary: Path) -> list[Blob]:
    """The bomb is in an entry that is passed over."""
    data = archive(member(b".wh..wh.x", bytes(2 * MAX_BYTES)))
    return [packed(gzip.compress(data, 9), data)]


def _header_bomb(_canary: Path) -> list[Blob]:
    """The bomb consists of headers of no entry."""
    data = member(b"x", pax_record(b"comment", bytes(1 << 19)), kind=b"x") * (4 * MAX_BYTES // (1 << 20)) + END
    return [packed(gzip.compress(data, 9), data)]


def _attribute_bomb(_canary: Path) -> list[Blob]:
    """Every directory has a mebibyte of attributes, which have to wait for the end."""
    records = {b"SCHILY.xattr.user.%d" % i: bytes(60_000) for i in range(16)}
    # Attributes that are kept in mind only: the same entry again and again replaces itself.
    data = archive(*(pax(records) + member(b"d%d" % i, kind=b"5") for i in range(20)))
    return [packed(gzip.compress(data, 9), data)]


def _window(_canary: Path) -> list[Blob]:
    """A zstd frame that wants a window of two gibibytes."""
    data = archive(member(b"f", b"x" * 1000))
    parameters = zstandard.ZstdCompressionParameters(window_log=31, compression_level=1)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size
    return [packed(frame.compress(data) + frame.flush(), data)]


def _entries(count: int) -> Callable[[Path], list[bytes]]:
    return lambda _canary: [archive(*(header(b"%d" % i) for i in range(count)))]


def _is_sparse(root: Path, _canary: Path) -> None:
    assert (root / "s").stat().st_size == TIB


_NOT_TAR = "is not a tar archive, or its data is damaged"
_MAP = "map"

SIZES: tuple[Case, ...] = (
    Case("a header says more than there is", _raw(header(b"f", size=5000) + b"x"), "cut off"),
    Case("a header says less than there is", _raw(header(b"f", size=10) + b"x" * 5000), _NOT_TAR),
    Case("a size of a pebibyte", _raw(header(b"f", size=base256(1 << 50)) + b"x"), "unpacks to more than"),
    Case("a negative size", _raw(header(b"f", size=base256(-1))), "size is not a number"),
    Case("a size of 2^80", _raw(header(b"f", size=base256(1 << 80))), "impossible size"),
    Case("a size of words", _raw(header(b"f", size=b"many bytes\0\0")), "size is not a number"),
    Case("a size with a sign", _raw(header(b"f", size=b"-0000000001\0")), "size is not a number"),
    Case("a PAX size that is negative", _raw(pax({b"size": b"-1"}), member(b"f", b"x")), "a number that is none"),
    Case("a PAX size of 2^64", _raw(pax({b"size": b"%d" % (1 << 64)}), member(b"f", b"x")), "impossible size"),
    Case("a PAX size that is larger", _raw(pax({b"size": b"90000"}), member(b"f", b"x")), "cut off"),
    Case("a PAX size that is smaller", _raw(pax({b"size": b"1"}), member(b"f", b"x" * 5000)), _NOT_TAR),
    Case("a directory with a size", _raw(header(b"d", kind=b"5", size=TIB >> 10), member(b"f", b"x"))),
    Case("a link with a size", _raw(header(b"l", kind=b"2", link=b"x", size=1 << 32), member(b"f", b"x"))),
    Case("an owner of 2^32-1", _raw(pax({b"uid": b"4294967295"}), member(b"f")), "which cannot exist"),
    Case("an owner of words", _raw(pax({b"gid": b"root"}), member(b"f")), "a number that is none"),
    Case("a time of words", _raw(pax({b"mtime": b"12.x"}), member(b"f")), "a time that is none"),
    Case("a time past all times", _raw(pax({b"mtime": b"9" * 19}), member(b"f"))),
    Case(
        "a PAX record of no length", _raw(member(b"x", b"0 a=b\n", kind=b"x"), member(b"f")), "PAX header is malformed"
    ),
    Case("a PAX record that is too long", _raw(member(b"x", b"99 a=b\n", kind=b"x"), member(b"f")), "malformed"),
    Case(
        "a PAX record of 10^18 bytes", _raw(member(b"x", b"9" * 18 + b" a=b\n", kind=b"x"), member(b"f")), "malformed"
    ),
    Case("a PAX record that is negative", _raw(member(b"x", b"-6 a=b\n", kind=b"x"), member(b"f")), "malformed"),
    Case("a PAX record without a key", _raw(member(b"x", b"5 =b\n", kind=b"x"), member(b"f")), "malformed"),
    Case("a PAX header of two mebibytes", _raw(member(b"x", bytes(2 << 20), kind=b"x")), "a tar header has 2097152"),
    Case("a PAX header of an exbibyte", _raw(header(b"x", kind=b"x", size=base256(1 << 60))), "a tar header has"),
    Case("a global header of an exbibyte", _raw(header(b"x", kind=b"g", size=base256(1 << 60))), "a tar header has"),
    Case("a GNU name of an exbibyte", _raw(header(b"x", kind=b"L", size=base256(1 << 60))), "a tar header has"),
    Case("a sparse file whose parts overlap", _raw(gnu_sparse([(0, 10), (5, 10)], 100, b"x" * 20)), _MAP),
    Case("a sparse file whose parts go back", _raw(gnu_sparse([(50, 10), (0, 10)], 100, b"x" * 20)), _MAP),
    Case("a sparse file with a part past its end", _raw(gnu_sparse([(95, 10)], 100, b"x" * 10)), _MAP),
    Case("a sparse file whose parts overflow", _raw(gnu_sparse([((1 << 63) - 5, 10)], 100, b"x" * 10)), _MAP),
    Case("a sparse file of less than its map", _raw(gnu_sparse([(0, 50)], 100, b"x" * 20)), "does not fit its data"),
    Case("a sparse file of more than its map", _raw(gnu_sparse([(0, 10)], 100, b"x" * 20)), "does not fit its data"),
    Case("a sparse map that goes on at the end", lambda _: [gnu_sparse([(0, 0)], 100, more=True)], "cut off"),
    Case("a listed sparse map that overlaps", _raw(_listed(b"0,10,5,10", b"x" * 20)), _MAP),
    Case("a listed sparse map of words", _raw(_listed(b"0,ten", b"x" * 10)), _MAP),
    Case("a listed sparse map of one number", _raw(_listed(b"0", b"")), _MAP),
    Case("a leading sparse map that overlaps", _raw(pax_sparse(b"2\n0\n10\n5\n10\n", b"x" * 20)), _MAP),
    Case("a leading sparse map of 10^19 parts", _raw(pax_sparse(b"9" * 19 + b"\n", b"")), _MAP),
    Case("a leading sparse map without an end", _raw(pax_sparse(b"1" * 4000, b"")), _MAP),
    Case(
        "a leading sparse map that goes on at the end",
        lambda _: [pax_sparse(b"9000\n" + b"1\n" * 200 + b"1" * 107, b"", stored=1 << 50)],
        "cut off",
    ),
    Case("a sparse file of a tebibyte", _raw(gnu_sparse([(TIB, 0)], TIB)), check=_is_sparse),
    Case("a sparse file of seven exbibytes", _raw(gnu_sparse([(7 << 60, 0)], 7 << 60)), "cannot be made"),
    Case("a gzip bomb", _bomb(gzip.compress), "more than"),
    Case("a zstd bomb", _bomb(zstandard.compress), "more than"),
    Case("a bomb behind the end", _tail_bomb, "more than"),
    Case("a bomb in what is passed over", _passed_over_bomb, "more than"),
    Case("a bomb of headers", _header_bomb, "more than"),
    Case("a bomb of attributes", _attribute_bomb, "attribute"),
    Case("a bomb of entries", _entries(MAX_ENTRIES + 1), f"more than {MAX_ENTRIES} entries"),
    Case("a zstd window of two gibibytes", _window, "zstd data is corrupt"),
    Case(
        "layers that are each within bounds",
        lambda _: [layer([Entry(f"f{i}", b"x" * 1000), directory("d")]) for i in range(60)],
        has_below=True,
    ),
    Case("a file that is nothing but holes and lies", lambda _: [plain(archive(gnu_sparse([(0, 0), (50, 0)], 50)))]),
)
