"""Tar archives that no honest tool writes: headers byte by byte."""

import io
import tarfile
from collections.abc import Mapping

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: bytes,
    *,
    kind: bytes = b"0",
    size: int | bytes = 0,
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    checksum: int | None = None,
) -> bytes:
    """One ustar header; `size` and others may be given as the bytes of their field."""
    block = bytearray(BLOCK)
    block[0:100] = name[:100].ljust(100, b"\0")
    block[100:108] = mode
    block[108:116] = uid
    block[116:124] = b"0000000\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[157:257] = link[:100].ljust(100, b"\0")
    block[257:265] = b"ustar\x0000"
    block[329:337] = b"%07o\0" % device[0]
    block[337:345] = b"%07o\0" % device[1]
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % (sum(block) if checksum is None else checksum)
    return bytes(block)


def member(name: bytes, data: bytes = b"", **fields: object) -> bytes:
    """A header with its data, padded."""
    fields.setdefault("size", len(data))
    return header(name, **fields) + data + bytes(-len(data) % BLOCK)  # type: ignore[arg-type]


def pax(records: Mapping[bytes, bytes]) -> bytes:
    """An extended header for the member that follows."""
    return member(b"PaxHeader", b"".join(pax_record(key, value) for key, value in records.items()), kind=b"x")


def pax_record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def archive(*members: bytes) -> bytes:
    return b"".join(members) + END


def packed(files: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A plain archive, as tarfile writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
