"""Header fields as HTTP/2 writes them. Source: RFC 7541."""

from collections import deque
from collections.abc import Callable, Iterable

_STATIC = (
    *(b":authority", b":method GET", b":method POST", b":path /", b":path /index.html", b":scheme http"),
    *(b":scheme https", b":status 200", b":status 204", b":status 206", b":status 304", b":status 400"),
    *(b":status 404", b":status 500", b"accept-charset", b"accept-encoding gzip, deflate", b"accept-language"),
    *(b"accept-ranges", b"accept", b"access-control-allow-origin", b"age", b"allow", b"authorization"),
    *(b"cache-control", b"content-disposition", b"content-encoding", b"content-language", b"content-length"),
    *(b"content-location", b"content-range", b"content-type", b"cookie", b"date", b"etag", b"expect", b"expires"),
    *(b"from", b"host", b"if-match", b"if-modified-since", b"if-none-match", b"if-range", b"if-unmodified-since"),
    *(b"last-modified", b"link", b"location", b"max-forwards", b"proxy-authenticate", b"proxy-authorization"),
    *(b"range", b"referer", b"refresh", b"retry-after", b"server", b"set-cookie", b"strict-transport-security"),
    *(b"transfer-encoding", b"user-agent", b"vary", b"via", b"www-authenticate"),
)
"""Appendix A, from 1 on; a value behind a space."""
_TABLE_BYTES = 4096
_ENTRY_BYTES = 32
"""What an entry counts beside its letters. Source: section 4.1."""

_SHORT, _MOST_KNOWN = 1024, 256
"""Blocks that are remembered."""

type Field = tuple[bytes, bytes]


class Decoder:
    """Of one connection: what a block of fields names by a number, an earlier one may have said."""

    def __init__(self) -> None:
        self._known: deque[Field] = deque()
        self._room = self._limit = _TABLE_BYTES
        self.has_learnt_nothing = True
        """So that what was decoded up to now means the same to everybody."""

    def fields(self, block: bytes) -> list[Field]:
        """Raises ValueError for what is malformed."""
        try:
            return self._fields(block)
        except IndexError:
            raise ValueError("the header fields are malformed") from None

    def meaning[T](self, block: bytes, of: Callable[[list[Field]], T], known: dict[bytes, T]) -> T:
        """What a block's fields come to; raises ValueError. Most blocks are the same few, over and over, and mean the
        same to everybody: these are `known` from then on."""
        found = known.get(block)
        if found is None:
            found = of(self.fields(block))
            if self.has_learnt_nothing and len(block) <= _SHORT:
                if len(known) >= _MOST_KNOWN:
                    known.clear()
                known[block] = found
        return found

    def _fields(self, block: bytes) -> list[Field]:
        found: list[Field] = []
        at = 0
        while at < len(block):
            first = block[at]
            if first & 0x80:
                number, at = _integer(block, at, 7)
                found.append(self._entry(number))
            elif first & 0xE0 == 0x20:
                limit, at = _integer(block, at, 5)
                self._resize(limit)
            else:
                number, at = _integer(block, at, 6 if first & 0x40 else 4)
                if number:
                    name = self._entry(number)[0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at)
                found.append((name, value))
                if first & 0x40:
                    self._remember(name, value)
        return found

    def _entry(self, number: int) -> Field:
        if number == 0:
            raise IndexError
        if number > len(_STATIC):
            return self._known[number - len(_STATIC) - 1]
        name, _, value = _STATIC[number - 1].partition(b" ")
        return name, value

    def _remember(self, name: bytes, value: bytes) -> None:
        self.has_learnt_nothing = False
        self._known.appendleft((name, value))
        self._room -= len(name) + len(value) + _ENTRY_BYTES
        self._forget()

    def _resize(self, limit: int) -> None:
        if limit > _TABLE_BYTES:
            raise IndexError
        self.has_learnt_nothing = False
        self._room += limit - self._limit
        self._limit = limit
        self._forget()

    def _forget(self) -> None:
        while self._room < 0 and self._known:
            name, value = self._known.pop()
            self._room += len(name) + len(value) + _ENTRY_BYTES


def encode(fields: Iterable[Field]) -> bytes:
    """Each as it is, for nobody to remember."""
    return b"".join(b"\0" + _length(name) + name + _length(value) + value for name, value in fields)


def _length(text: bytes) -> bytes:
    rest = len(text) - 127
    if rest < 0:
        return bytes((len(text),))
    written = bytearray((127,))
    while rest >= 128:
        written.append(rest & 127 | 128)
        rest >>= 7
    written.append(rest)
    return bytes(written)


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """The number in the last `bits` of this byte and those that follow, and where it ends. Source: section 5.1."""
    most = (1 << bits) - 1
    value = block[at] & most
    at += 1
    if value < most:
        return value, at
    for shift in range(0, 28, 7):
        byte = block[at]
        at += 1
        value += (byte & 127) << shift
        if byte < 128:
            return value, at
    raise IndexError


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    is_packed = block[at] & 0x80
    length, at = _integer(block, at, 7)
    end = at + length
    if end > len(block):
        raise IndexError
    text = block[at:end]
    if is_packed:
        from corral.rpc.huffman import unpack

        text = unpack(text)
    return text, end
