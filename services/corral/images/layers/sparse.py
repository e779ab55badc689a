"""Sparse files in tar: which parts of a file are stored, the rest being holes.

    GNU        type 'S': four (offset, length) in the header, 21 more in each block that follows
    PAX 0.0    GNU.sparse.offset and GNU.sparse.numbytes, again and again
    PAX 0.1    GNU.sparse.map = "offset,length,offset,length,…"
    PAX 1.0    the map is decimal lines at the beginning of the data

Source: GNU tar manual, "Storing Sparse Files"; Go archive/tar reader.go.
"""

from collections.abc import Callable, Iterable

from corral.images.layers.errors import BadLayer

BLOCK = 512
MAX_EXTENTS = 1_000_000

type Extents = tuple[tuple[int, int], ...]


def gnu_extents(
    block: bytes, next_block: Callable[[], bytes], number: Callable[[bytes, str], int]
) -> tuple[Extents, int]:
    """The extents and the whole size of a GNU sparse header; reads the blocks that continue it. Raises BadLayer."""
    size = number(block[483:495], "size")
    fields, more = block[386:482], block[482] != 0
    found: list[tuple[int, int]] = []
    while True:
        for start in range(0, len(fields) - 23, 24):
            if not fields[start]:
                break
            found.append((number(fields[start : start + 12], "size"), number(fields[start + 12 : start + 24], "size")))
        if not more:
            return checked(found, size), size
        if len(found) > MAX_EXTENTS:
            raise _malformed()
        block = next_block()
        fields, more = block[:504], block[504] != 0


def listed_extents(text: bytes, size: int) -> Extents:
    """PAX 0.1, and 0.0 put into the same form. Raises BadLayer."""
    numbers = [_decimal(field) for field in text.split(b",")] if text else []
    return _paired(numbers, size)


def leading_extents(read: Callable[[int], bytes], size: int) -> Extents:
    """PAX 1.0: takes the map from the beginning of the data. Raises BadLayer."""
    data = read(BLOCK)
    count, position = _line(data, 0)
    if count > MAX_EXTENTS:
        raise _malformed()
    numbers: list[int] = []
    while len(numbers) < 2 * count:
        while b"\n" not in data[position:]:
            data = data[position:] + read(BLOCK)
            position = 0
            if len(data) > 2 * BLOCK:
                raise _malformed()
        value, position = _line(data, position)
        numbers.append(value)
    return _paired(numbers, size)


def checked(extents: Iterable[tuple[int, int]], size: int) -> Extents:
    """The extents, if they lie one after another inside the file. Raises BadLayer."""
    found = tuple(extents)
    end = 0
    for offset, length in found:
        if offset < end or length < 0:
            raise _malformed()
        end = offset + length
    if not end <= size < 1 << 63:
        raise _malformed()
    return found


def _paired(numbers: list[int], size: int) -> Extents:
    if len(numbers) % 2:
        raise _malformed()
    return checked(zip(numbers[::2], numbers[1::2], strict=True), size)


def _line(data: bytes, position: int) -> tuple[int, int]:
    end = data.find(b"\n", position)
    if end < 0:
        raise _malformed()
    return _decimal(data[position:end]), end + 1


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise _malformed()
    return int(text)


def _malformed() -> BadLayer:
    return BadLayer("the map of a sparse file is malformed")
