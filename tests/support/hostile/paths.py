"""Names and links that lead out of the root, or would if somebody followed them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from support.hostile.case import Case
from support.images import Entry, directory, layer, symlink
from support.tars import archive, header, member, pax

LINK = b"1"


def _entries(build: Callable[[str], Sequence[Entry]]) -> Callable[[Path], list[bytes]]:
    """A layer of entries, given the canary's path as text."""
    return lambda canary: [layer(build(str(canary)))]


def _raw(*members: bytes) -> Callable[[Path], list[bytes]]:
    return lambda _canary: [archive(*members)]


def hard(name: str, target: str) -> Entry:
    return Entry(name, kind=LINK, link=target)


def up(path: str) -> str:
    return "../" * 20 + path.lstrip("/")


def _is_inside(name: str) -> Callable[[Path, Path], None]:
    """The file was made, in the root, where the canary's path leads to there."""

    def check(root: Path, canary: Path) -> None:
        assert (root / str(canary).lstrip("/") / name).read_bytes() == b"owned"

    return check


def _is_file(name: str, data: bytes = b"owned") -> Callable[[Path, Path], None]:
    def check(root: Path, _canary: Path) -> None:
        assert not (root / name).is_symlink()
        assert (root / name).read_bytes() == data

    return check


def _deep_by_links(canary: Path) -> list[bytes]:
    """Ten thousand levels: a link to five hundred of them, below a link to five hundred of them, and so on."""
    del canary
    members = [member(b"l0", kind=b"2", link=b".")]
    for i in range(20):
        below = b"/d" * 500
        members += [
            pax({b"path": b"l%d%s" % (i, below)}) + member(b"x", kind=b"5"),
            pax({b"linkpath": b"l%d%s" % (i, below)}) + member(b"l%d" % (i + 1), kind=b"2"),
        ]
    return [archive(*members, member(b"l20/owned", b"x"))]


def _many_without_entries(canary: Path) -> list[bytes]:
    """Forty paths of two thousand directories that no entry describes, on a layer that may have them."""
    del canary
    deep = [pax({b"path": b"%d" % i + b"/d" * 1990 + b"/f"}) + member(b"x", b"1") for i in range(40)]
    return [layer([directory("base")]), archive(*deep)]


def _steps(canary: str) -> list[Entry]:
    return [symlink("a", "b"), symlink("b", "c"), symlink("c", canary), Entry("a/owned", b"owned")]


def _swapped(canary: str) -> list[Entry]:
    return [directory("d"), Entry("d/a", b"1"), symlink("d", canary), Entry("d/owned", b"owned")]


def _swapped_above(canary: str) -> list[Entry]:
    return [directory("d/e/f"), Entry("d/e/f/a", b"1"), symlink("d", canary + "/.."), Entry("d/e/f/owned", b"owned")]


PATHS: tuple[Case, ...] = (
    Case("a name climbs", _entries(lambda c: [Entry(up(c) + "/owned", b"owned")]), "climbs with '..'"),
    Case("a name climbs in the middle", _entries(lambda c: [Entry("d/../../../" + c, b"owned")]), "climbs"),
    Case("a name ends by climbing", _entries(lambda _: [directory("a"), directory("a/..")]), "climbs"),
    Case("a name is nothing but dots", _entries(lambda _: [directory("..")]), "climbs"),
    Case("an absolute name", _entries(lambda c: [Entry(c + "/owned", b"owned")]), check=_is_inside("owned")),
    Case("many slashes", _entries(lambda c: [Entry("////." + c + "//./owned", b"owned")]), check=_is_inside("owned")),
    Case(
        "a parent is an absolute link",
        _entries(lambda c: [symlink("d", c), Entry("d/owned", b"owned")]),
        check=_is_inside("owned"),
    ),
    Case(
        "a parent is a climbing link",
        _entries(lambda c: [symlink("d", up(c)), Entry("d/owned", b"owned")]),
        check=_is_inside("owned"),
    ),
    Case("a parent is a chain of links", _entries(_steps), check=_is_inside("owned")),
    Case(
        "a parent leads through /proc",
        _entries(lambda c: [symlink("d", "/proc/self/root"), Entry(f"d{c}/owned", b"owned")]),
        check=lambda root, canary: _is_file(f"proc/self/root{canary}/owned")(root, canary),
    ),
    Case(
        "a parent is a descriptor of the process",
        _entries(lambda _: [symlink("d", "/proc/self/fd/3"), Entry("d/owned", b"owned")]),
        check=_is_file("proc/self/fd/3/owned"),
    ),
    Case("a directory becomes a link", _entries(_swapped), check=_is_inside("owned")),
    Case("a directory far above becomes a link", _entries(_swapped_above)),
    Case(
        "a link is written through",
        _entries(lambda c: [symlink("f", f"{c}/kept"), Entry("f", b"owned")]),
        check=_is_file("f"),
    ),
    Case(
        "a link is made a directory of another mode",
        _entries(lambda c: [symlink("d", c), directory("d", 0o777, uid=7)]),
        check=lambda root, _: _assert((root / "d").is_dir() and not (root / "d").is_symlink()),
    ),
    Case(
        "a link goes and comes again",
        _entries(lambda c: [symlink("d", c), directory("d"), symlink("d", c), Entry("d/owned", b"owned")]),
        check=_is_inside("owned"),
    ),
    Case("a hard link to an absolute path", _entries(lambda c: [hard("h", f"{c}/kept")]), "does not have"),
    Case("a hard link climbs", _entries(lambda c: [hard("h", up(c) + "/kept")]), "climbs"),
    Case(
        "a hard link leads through a link",
        _entries(lambda c: [symlink("d", c), hard("h", "d/kept"), Entry("h", b"owned")]),
        "does not have",
    ),
    Case(
        "a second name of a link is written through",
        _entries(lambda c: [symlink("s", f"{c}/kept"), hard("h", "s"), Entry("h", b"owned")]),
        check=_is_file("h"),
    ),
    Case(
        "a parent is a hard link to a file",
        _entries(lambda _: [Entry("f", b"x"), hard("h", "f"), Entry("h/owned", b"owned")]),
        "not a directory",
    ),
    Case(
        "a parent is a hard link to a link",
        _entries(lambda c: [symlink("s", c), hard("h", "s"), Entry("h/owned", b"owned")]),
        check=_is_inside("owned"),
    ),
    Case("a hard link to the root", _entries(lambda _: [hard("h", "/")]), "hard link to a directory"),
    Case(
        "a hard link to a directory", _entries(lambda _: [directory("d"), hard("h", "d")]), "hard link to a directory"
    ),
    Case("a hard link to itself", _entries(lambda _: [hard("h", "h")])),
    Case(
        "a link of the layer below is a parent",
        lambda c: [layer([symlink("d", str(c))]), layer([Entry("d/owned", b"owned")])],
        has_below=True,
    ),
    Case(
        "a hard link leads through a link of the layer below",
        lambda c: [layer([symlink("d", str(c))]), layer([hard("h", "d/kept")])],
        "which no layer has",
        has_below=True,
    ),
    Case(
        "a hard link to a link of the layer below",
        lambda c: [layer([symlink("s", f"{c}/kept")]), layer([hard("h", "s"), Entry("x", b"")])],
        "which no layer has",
        has_below=True,
    ),
    Case("the root is a file", _raw(member(b"./", b"x")), "replace the root"),
    Case("the root is a link", _entries(lambda c: [Entry("/", kind=b"2", link=c)]), "replace the root"),
    Case("links in a circle", _entries(lambda _: [symlink("a", "b"), symlink("b", "a"), Entry("a/x")]), "circle"),
    Case("a link to itself", _entries(lambda _: [symlink("a", "a"), Entry("a/x")]), "circle"),
    Case("a link to nothing", _raw(member(b"l", kind=b"2")), "symbolic link to nothing"),
    Case(
        "ten thousand levels in one name", _raw(pax({b"path": b"d/" * 10_000}), member(b"x", kind=b"5")), "longer than"
    ),
    Case("ten thousand levels by links", _deep_by_links),
    Case("long paths without an entry", _many_without_entries, "directories that no entry describes", has_below=True),
    Case("a name of 256 bytes", _raw(pax({b"path": b"n" * 256}), member(b"x", b"1")), "too long"),
    Case("a parent of 256 bytes", _raw(pax({b"path": b"n" * 256 + b"/x"}), member(b"x", b"1")), "too long"),
    Case("a name of 5,000 bytes", _raw(pax({b"path": b"n/" * 2500}), member(b"x", b"1")), "longer than"),
    Case("a link of 5,000 bytes", _raw(pax({b"linkpath": b"n" * 5000}), member(b"x", kind=b"2")), "longer than"),
    Case("a GNU name of 5,000 bytes", _raw(member(b"././@LongLink", b"n/" * 2500, kind=b"L"), member(b"x")), "longer"),
    Case("a NUL byte in a name", _raw(pax({b"path": b"a\0b"}), member(b"x", b"1")), "holds a NUL byte"),
    Case("a NUL byte in a link", _raw(pax({b"linkpath": b"a\0b"}), member(b"x", kind=b"2")), "holds a NUL byte"),
    Case(
        "control characters in a name",
        _raw(member(b"\x1b]0;owned\x07\r\n\x7f", b"owned")),
        check=_is_file("\x1b]0;owned\x07\r\n\x7f"),
    ),
    Case("control characters in a refusal", _raw(member(b"..//\x1b]0;owned\x07\r\n\xc2\x9b31m", b"x")), "climbs"),
    Case(
        "a name that is not UTF-8",
        _raw(member(b"\xff\xfe\x80", b"owned")),
        check=lambda root, _: _assert((root / "\udcff\udcfe\udc80").read_bytes() == b"owned"),
    ),
    Case("a refused name that is not UTF-8", _raw(member(b"../\xff\xfe\x80", b"owned")), "climbs"),
    Case("an empty name", _raw(member(b"", b"x")), "replace the root"),
    Case("a type that does not exist", _raw(member(b"x", b"1", kind=b"\x1b")), "type that images do not have"),
    Case(
        "a thousand entries of one name",
        _raw(*(member(b"x", b"%d" % i) for i in range(1000))),
        check=_is_file("x", b"999"),
    ),
    Case(
        "one name is everything in turn",
        _entries(
            lambda c: [
                directory("x"),
                Entry("x/y", b"1"),
                Entry("x", b"1"),
                symlink("x", c),
                Entry("x", kind=b"6"),
                Entry("x", kind=b"3", device=(1, 3)),
                directory("x"),
                Entry("x/z", b"owned"),
            ]
        ),
        check=_is_file("x/z"),
    ),
    Case(
        "a device of the host's memory",
        _entries(lambda _: [Entry("mem", mode=0o666, kind=b"3", device=(1, 1))]),
        check=lambda root, _: _assert((root / "mem").is_char_device()),
    ),
    Case("a device that cannot exist", _raw(header(b"d", kind=b"3", device=(99_999, 1))), "cannot exist"),
    Case(
        "a device in place of a directory of the layer below",
        lambda c: [layer([directory("d"), Entry("d/f")]), layer([Entry("d", kind=b"3", device=(0, 0))])],
        has_below=True,
    ),
)


def _assert(fact: bool) -> None:
    assert fact
