"""Headers of tar entries: what TarReader reads, written. The same entry always gives the same bytes.

ustar where it can say it, with PAX records before it where it cannot: long or non-ASCII names, large numbers,
attributes, and sparse files, whose map comes first in their data. Times are whole seconds, as docker and containerd
write them.

Source: POSIX.1-2017 pax "ustar Interchange Format", "pax Extended Header"; attributes as Go's archive/tar has them.
"""

from collections.abc import Mapping

from corral.images.layers.tar import BLOCK, XATTR_KEY, Entry, Kind

END = bytes(2 * BLOCK)

_MAX_NAME = 100
_MAX_OCTAL_7 = 0o7777777
_MAX_OCTAL_11 = 0o77777777777
_SECOND_NS = 1_000_000_000
_CHECKSUM = slice(148, 156)


def header(entry: Entry) -> bytes:
    """Everything that comes before the entry's data, which of a sparse file is its extents alone."""
    sparse = _sparse_map(entry)
    size = entry.size if entry.kind is Kind.FILE else 0
    if entry.extents is not None:
        size = len(sparse) + sum(length for _, length in entry.extents)
    records = _records(entry, size)
    block = _block(entry, entry.kind.value, size)
    if not records:
        return block
    data = b"".join(_record(key, value) for key, value in sorted(records.items()))
    described = Entry(b"PaxHeaders/" + entry.name[-60:].rpartition(b"/")[2], Kind.FILE, 0o644, 0, 0, len(data), 0)
    return _block(described, b"x", len(data)) + data + padding(len(data)) + block + sparse


def _sparse_map(entry: Entry) -> bytes:
    """How many extents, and of each offset and length, a line each."""
    if entry.extents is None:
        return b""
    numbers = [len(entry.extents), *(n for extent in entry.extents for n in extent)]
    text = b"".join(b"%d\n" % n for n in numbers)
    return text + padding(len(text))


def padding(size_bytes: int) -> bytes:
    """What follows that much data."""
    return bytes(-size_bytes % BLOCK)


def _records(entry: Entry, size: int) -> Mapping[bytes, bytes]:
    records = {XATTR_KEY + name: value for name, value in entry.xattrs.items()}
    texts = {b"path": entry.name, b"linkpath": entry.link}
    records |= {key: text for key, text in texts.items() if len(text) > _MAX_NAME or not text.isascii()}
    for key, value, most in (
        (b"uid", entry.uid, _MAX_OCTAL_7),
        (b"gid", entry.gid, _MAX_OCTAL_7),
        (b"size", size, _MAX_OCTAL_11),
        (b"mtime", entry.mtime_ns // _SECOND_NS, _MAX_OCTAL_11),
    ):
        if not 0 <= value <= most:
            records[key] = b"%d" % value
    if entry.extents is not None:
        records[b"GNU.sparse.major"], records[b"GNU.sparse.minor"] = b"1", b"0"
        records[b"GNU.sparse.name"], records[b"GNU.sparse.realsize"] = entry.name, b"%d" % entry.size
    return records


def _record(key: bytes, value: bytes) -> bytes:
    """LENGTH KEY=VALUE and a line feed, the length counting its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _block(entry: Entry, typeflag: bytes, size: int) -> bytes:
    block = bytearray(BLOCK)
    block[0 : min(len(entry.name), _MAX_NAME)] = entry.name[:_MAX_NAME]
    block[100:108] = _octal(entry.mode, 8)
    block[108:116] = _octal(entry.uid, 8)
    block[116:124] = _octal(entry.gid, 8)
    block[124:136] = _octal(size, 12)
    block[136:148] = _octal(entry.mtime_ns // _SECOND_NS, 12)
    block[_CHECKSUM] = b" " * 8
    block[156:157] = typeflag
    block[157 : 157 + min(len(entry.link), _MAX_NAME)] = entry.link[:_MAX_NAME]
    block[257:265] = b"ustar\x0000"
    block[329:337] = _octal(entry.device[0], 8)
    block[337:345] = _octal(entry.device[1], 8)
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def _octal(value: int, width: int) -> bytes:
    """0 for what does not fit: a record says it then."""
    digits = b"%0*o\0" % (width - 1, value) if value >= 0 else b""
    return digits if len(digits) == width else b"%0*o\0" % (width - 1, 0)
