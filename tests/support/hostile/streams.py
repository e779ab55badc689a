"""Data that ends too early, goes on too long, or is not what it says it is."""

import gzip
from collections.abc import Callable
from pathlib import Path

import zstandard

from support.hostile.case import Blob, Case, packed, plain
from support.images import Entry, layer
from support.tars import BLOCK, archive, member, pax

DATA = archive(member(b"a", b"a" * 3000), pax({b"path": b"b"}) + member(b"x", b"b" * 700), member(b"c"))


def _cut(size: int) -> Callable[[Path], list[Blob]]:
    return lambda _canary: [plain(DATA[:size])]


def _damaged(stored: bytes, data: bytes = DATA) -> Callable[[Path], list[Blob]]:
    """The config speaks of `data`, which is not what comes."""
    return lambda _canary: [packed(stored, data)]


def _has(*names: str) -> Callable[[Path, Path], None]:
    def check(root: Path, _canary: Path) -> None:
        assert {path.name for path in root.iterdir()} == set(names)

    return check


_GZIP, _ZSTD = gzip.compress(DATA, mtime=0), zstandard.compress(DATA)
_ONE, _TWO = archive(member(b"one", b"1")), archive(member(b"two", b"2"))
_FLIPPED = bytearray(_GZIP)
_FLIPPED[len(_GZIP) // 2] ^= 0x55

_OTHER = "but the image's config says"

STREAMS: tuple[Case, ...] = (
    Case("cut in the middle of a header", _cut(100), "cut off"),
    Case("cut behind a header", _cut(BLOCK), "cut off"),
    Case("cut in the middle of data", _cut(BLOCK + 1000), "cut off"),
    Case("cut in the padding", _cut(BLOCK + 3010), "cut off"),
    Case("cut in a PAX header", _cut(BLOCK * 8 + 20), "cut off"),
    Case("cut between a PAX header and its entry", _cut(BLOCK * 9), refused_as_rootfs="cut off"),
    Case(
        "cut before the end mark", _cut(len(DATA) - 2 * BLOCK), check=_has("a", "b", "c"), refused_as_rootfs="cut off"
    ),
    Case("cut in the end mark", _cut(len(DATA) - BLOCK), check=_has("a", "b", "c")),
    Case("nothing at all", lambda _: [plain(b"")], refused_as_rootfs="cut off"),
    Case("gzip cut in its header", _damaged(_GZIP[:5]), "cut off"),
    Case("gzip cut in the middle", _damaged(_GZIP[: len(_GZIP) // 2]), "cut off"),
    Case("gzip cut in its checksum", _damaged(_GZIP[:-3]), "cut off"),
    Case("gzip with other content than its checksum", _damaged(_GZIP[:-8] + b"\0" * 8), "gzip data is corrupt"),
    Case("gzip with a bit flipped", _damaged(bytes(_FLIPPED)), "its"),
    Case("zstd cut in its header", _damaged(_ZSTD[:5]), _OTHER, refused_as_rootfs="cut off"),
    Case("zstd cut in the middle", _damaged(_ZSTD[: len(_ZSTD) // 2]), _OTHER, refused_as_rootfs="cut off"),
    Case(
        "zstd of nothing but frames to skip",
        _damaged(b"\x50\x2a\x4d\x18\4\0\0\0skip", b""),
        refused_as_rootfs="cut off",
    ),
    Case("bzip2", _damaged(b"BZh91AY&SY" + bytes(1000)), "bzip2"),
    Case("garbage behind the end", lambda _: [plain(DATA + b"garbage" * 1000)], check=_has("a", "b", "c")),
    Case("a second archive behind the end", lambda _: [plain(_ONE + _TWO)], check=_has("one")),
    Case("garbage behind gzip", _damaged(_GZIP + b"garbage" * 1000), check=_has("a", "b", "c")),
    Case("gzip behind gzip", _damaged(gzip.compress(_ONE) + gzip.compress(_TWO), _ONE + _TWO), check=_has("one")),
    Case("an archive in two members of gzip", _damaged(gzip.compress(DATA[:700]) + gzip.compress(DATA[700:]))),
    Case("gzip in gzip", _damaged(gzip.compress(_GZIP), _GZIP), "cut off"),
    Case("zstd behind gzip", _damaged(gzip.compress(_ONE) + zstandard.compress(_TWO), _ONE), check=_has("one")),
    Case(
        "an index in place of a tar", lambda _: [plain(b'{"schemaVersion":2,"manifests":[]}' * 40)], "not a tar archive"
    ),
    Case("a checksum that is wrong", lambda _: [plain(archive(member(b"f", b"x", checksum=1)))], "checksum is wrong"),
    Case("noise", lambda _: [plain(bytes(range(1, 256)) * 20)], "not a tar archive"),
    Case("other content than the config says", _damaged(_ONE, _TWO), _OTHER),
    Case("all zeros", lambda _: [plain(bytes(BLOCK * 4))]),
    Case("a layer of nothing on one of something", lambda _: [layer([Entry("f", b"x")]), archive()], check=_has("f")),
)
