"""A streaming tar reader for data that nobody vouches for: ustar, PAX and GNU, names as bytes, everything bounded.

Differs from tarfile in what an image needs: it never seeks, never keeps the members, takes names as the bytes they are,
and does per entry a fifth of the work, which counts when a layer has 100,000 of them.

Source: POSIX.1-2017 pax "ustar Interchange Format", "pax Extended Header"; GNU tar manual, "Basic Tar Format".
Where these leave a choice it is Go's archive/tar, which nearly every image was written and is read with.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from corral.images.layers.errors import BadLayer, Truncated
from corral.images.layers.sparse import gnu_extents, leading_extents, listed_extents
from corral.images.layers.stream import ByteStream

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20  # a PAX header or GNU long name; Go's limit
MAX_PATH_BYTES = 4095  # no program could name a longer one
MAX_XATTR_BYTES = 65536  # XATTR_SIZE_MAX
MAX_XATTR_NAME_BYTES = 255  # XATTR_NAME_MAX
XATTR_KEY = b"SCHILY.xattr."
SPARSE_MAP = b"GNU.sparse.map"

_MAX_ID = 0xFFFF_FFFE  # -1 would mean "leave it" to chown
_MAX_TIME_NS = 1 << 63
_ZEROS = bytes(BLOCK)
_ONLY_PREFIX = frozenset({b"", b"user.", b"trusted.", b"security.", b"system."})
# name mode uid gid size mtime checksum type linkname magic+version uname gname devmajor devminor prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_USTAR = b"ustar\x0000"


class Kind(Enum):
    FILE = b"0"
    HARDLINK = b"1"
    SYMLINK = b"2"
    CHARACTER = b"3"
    BLOCK = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"


_GNU_SPARSE = b"S"
_KINDS = {kind.value: kind for kind in Kind} | {b"\0": Kind.FILE, b"7": Kind.FILE, _GNU_SPARSE: Kind.FILE}


@dataclass(slots=True)
class Entry:
    """One member. Names are bytes as the archive has them: not normalized, not checked."""

    name: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    # Of a sparse file: where the stored bytes belong, as (offset, length); `size` is with the holes.
    extents: tuple[tuple[int, int], ...] | None = None

    @property
    def shown(self) -> str:
        """The name for an error message: short, and without control characters."""
        return shown(self.name)


def shown(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return repr(clean if len(clean) <= 120 else clean[:60] + "…" + clean[-59:]).replace("\\\\", "\\")


class TarReader:
    """Iterate for the entries; read the payload of each, or not, before going on to the next."""

    def __init__(self, stream: ByteStream, *, needs_end: bool = True) -> None:
        """needs_end: an archive without its end mark counts as cut off. Not needed where a digest proves the whole."""
        self._stream = stream
        self._needs_end = needs_end
        self._unread = 0
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        """Raises BadLayer, Truncated."""
        pax: dict[bytes, bytes] = {}
        long_name = long_link = None
        while (block := self._next_header()) is not None:
            typeflag = block[156:157]
            if typeflag == b"x":
                pax = parse_pax(self._extension(block))
            elif typeflag == b"L":
                long_name = self._extension(block).split(b"\0", 1)[0]
            elif typeflag == b"K":
                long_link = self._extension(block).split(b"\0", 1)[0]
            elif typeflag in (b"g", b"V"):
                self._extension(block)  # global headers (git writes them) and volume labels say nothing of interest
            else:
                entry = self._entry(block, pax, long_name, long_link)
                pax, long_name, long_link = {}, None, None
                yield entry

    def payload(self, size: int | None = None) -> Iterator[memoryview]:
        """What is unread of the current entry's stored bytes, or the next `size` of it."""
        for view in self._stream.views(self._unread if size is None else min(size, self._unread)):
            self._unread -= len(view)
            yield view

    def read(self, size: int) -> bytes:
        """`size` bytes of the current entry's payload. Raises BadLayer if it has fewer."""
        if size > self._unread:
            raise BadLayer("an entry is shorter than its own description")
        self._unread -= size
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) != size:
            raise Truncated("it ends in the middle of an entry: it was cut off")
        return data

    def _next_header(self) -> bytes | None:
        if self._unread or self._padding:
            self._stream.skip(self._unread + self._padding)
            self._unread = self._padding = 0
        block = self._stream.read(BLOCK)
        if not block:
            if self._needs_end:
                raise Truncated("it ends without an end mark: it was cut off")
            return None
        if block == _ZEROS:
            return None
        check_sum(block)
        return block

    def _extension(self, block: bytes) -> bytes:
        size = number(block[124:136], "size")
        if size > MAX_EXTENSION_BYTES:
            raise BadLayer(f"a tar header has {size} bytes; at most {MAX_EXTENSION_BYTES} are taken")
        data = self._stream.read(size) if size else b""
        if len(data) != size:
            raise Truncated("it ends in the middle of a header: it was cut off")
        self._stream.skip(-size % BLOCK)
        return data

    def _entry(self, block: bytes, pax: dict[bytes, bytes], name: bytes | None, link: bytes | None) -> Entry:
        entry = parse_header(block)
        entry.name = entry.name if name is None else name
        entry.link = entry.link if link is None else link
        stored = entry.size
        if pax:
            apply_pax(entry, pax)
            stored = entry.size
        if block[156:157] == b"\0" and entry.name.endswith(b"/"):
            entry.kind = Kind.DIRECTORY  # as tar wrote directories before 1988
        if entry.kind is not Kind.FILE:
            entry.size = stored = 0
        if len(entry.name) > MAX_PATH_BYTES or len(entry.link) > MAX_PATH_BYTES:
            raise BadLayer(f"entry {entry.shown} has a path longer than {MAX_PATH_BYTES} bytes")
        self._unread, self._padding = stored, -stored % BLOCK
        if block[156:157] == _GNU_SPARSE:
            entry.extents, entry.size = gnu_extents(block, lambda: self._exactly(BLOCK), number)
        elif pax and entry.kind is Kind.FILE:
            self._pax_sparse(entry, pax)
        if entry.extents is not None and sum(length for _, length in entry.extents) != self._unread:
            raise BadLayer(f"entry {entry.shown} is a sparse file whose map does not fit its data")
        return entry

    def _pax_sparse(self, entry: Entry, pax: dict[bytes, bytes]) -> None:
        size = pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size"))
        if size is None:
            return
        entry.size = _size(_decimal(size))
        entry.name = _pax_path(pax.get(b"GNU.sparse.name", entry.name))
        if pax.get(b"GNU.sparse.major", b"0") == b"0":
            entry.extents = listed_extents(pax.get(SPARSE_MAP, b""), entry.size)
        else:
            entry.extents = leading_extents(self.read, entry.size)


def check_sum(block: bytes) -> None:
    """Raises BadLayer if the header's checksum is wrong; some writers summed signed bytes."""
    stored = number(block[148:156], "checksum")
    fixed = sum(block) - sum(block[148:156]) + 8 * 0x20
    if stored != fixed:
        signed = fixed - 256 * sum(1 for b in block[:148] + block[156:] if b >= 0x80)
        if stored != signed:
            raise BadLayer("it is not a tar archive, or its data is damaged: a header's checksum is wrong")


def number(data: bytes, what: str) -> int:
    """A numeric field: octal digits, or base 256 where the first bit is set. Raises BadLayer."""
    if data[0] & 0x80:
        value = int.from_bytes(data, "big", signed=False) & ((1 << (8 * len(data) - 1)) - 1)
        if data[0] & 0x40:
            value -= 1 << (8 * len(data) - 1)
    else:
        digits = data.strip(b" \0").split(b"\0", 1)[0]
        if not digits:
            return 0
        try:
            value = int(digits, 8)
        except ValueError:
            value = -1
    if value < 0 and what != "time":
        raise BadLayer(f"it is not a tar archive, or its data is damaged: a header's {what} is not a number")
    return value


def parse_header(block: bytes) -> Entry:
    """The entry that a header alone describes. Raises BadLayer."""
    name, mode, uid, gid, size, mtime, _, typeflag, link, magic, _, _, major, minor, prefix = _HEADER.unpack(block)
    kind = _KINDS.get(typeflag)
    name = name.split(b"\0", 1)[0]
    if kind is None:
        raise BadLayer(f"entry {shown(name)} is of a type that images do not have ({shown(typeflag)})")
    if magic == _USTAR and prefix[0]:
        name = prefix.split(b"\0", 1)[0] + b"/" + name
    device = _device(name, major, minor) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0)
    return Entry(
        name=name,
        kind=kind,
        mode=number(mode, "mode") & 0o7777,
        uid=_owner(number(uid, "owner")),
        gid=_owner(number(gid, "owner")),
        size=_size(number(size, "size")),
        mtime_ns=_time(number(mtime, "time") * 1_000_000_000),
        link=link.split(b"\0", 1)[0],
        device=device,
    )


def _owner(value: int) -> int:
    if not 0 <= value <= _MAX_ID:
        raise BadLayer(f"an entry belongs to user or group {value}, which cannot exist")
    return value


def _device(name: bytes, major: bytes, minor: bytes) -> tuple[int, int]:
    device = number(major, "device"), number(minor, "device")
    if device[0] >= 1 << 12 or device[1] >= 1 << 20:  # the kernel's dev_t
        raise BadLayer(f"entry {shown(name)} is device {device[0]}:{device[1]}, which cannot exist")
    return device


def _time(value_ns: int) -> int:
    """As Go has it: what no file system could keep becomes the epoch."""
    return value_ns if 0 <= value_ns < _MAX_TIME_NS else 0


def _size(value: int) -> int:
    if not 0 <= value < 1 << 63:
        raise BadLayer("an entry has an impossible size")
    return value


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of an extended header. Raises BadLayer."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        length = data[position : max(space, position)]
        end = position + int(length) if length.isdigit() else 0
        if end <= max(space, position) or end > len(data) or data[end - 1] != 0x0A:
            raise BadLayer("a PAX header is malformed")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or not key:
            raise BadLayer("a PAX header is malformed")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):  # version 0.0, in the form of 0.1
            records[SPARSE_MAP] = records[SPARSE_MAP] + b"," + value if SPARSE_MAP in records else value
        else:
            records[key] = value
        position = end
    return records


def apply_pax(entry: Entry, records: dict[bytes, bytes]) -> None:
    """Let the records overrule what the header says. Raises BadLayer."""
    for key, value in records.items():
        if key == b"path":
            entry.name = _pax_path(value)
        elif key == b"linkpath":
            entry.link = _pax_path(value)
        elif key == b"size":
            entry.size = _size(_decimal(value))
        elif key == b"uid":
            entry.uid = _owner(_decimal(value))
        elif key == b"gid":
            entry.gid = _owner(_decimal(value))
        elif key == b"mtime":
            entry.mtime_ns = _time(pax_time_ns(value))
        elif key.startswith(XATTR_KEY):
            entry.xattrs[_xattr_name(entry, key[len(XATTR_KEY) :], value)] = value


def _pax_path(value: bytes) -> bytes:
    if b"\0" in value:
        raise BadLayer(f"an entry's name {shown(value)} holds a NUL byte")
    return value


def _xattr_name(entry: Entry, name: bytes, value: bytes) -> bytes:
    """What no system call takes, or only some file systems do, is refused before it is at any."""
    if b"\0" in name or len(name) > MAX_XATTR_NAME_BYTES or name in _ONLY_PREFIX:
        raise BadLayer(f"entry {entry.shown}: attribute {shown(name)} cannot be set: no attribute has such a name")
    if len(value) > MAX_XATTR_BYTES:
        raise BadLayer(f"entry {entry.shown} has an extended attribute of {len(value)} bytes")
    return name


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise BadLayer("a PAX header has a number that is none")
    return int(value)


def pax_time_ns(value: bytes) -> int:
    """Seconds with an optional fraction, perhaps negative, as nanoseconds. Raises BadLayer."""
    sign = -1 if value.startswith(b"-") else 1
    whole, _, fraction = value.lstrip(b"-").partition(b".")
    if fraction and not fraction.isdigit():
        raise BadLayer("a PAX header has a time that is none")
    nanoseconds = int((fraction + b"000000000")[:9])
    return sign * (_decimal(whole or b"0") * 1_000_000_000 + nanoseconds)
