"""Whiteouts of what is not theirs to hide, and devices and attributes that pose as one."""

from collections.abc import Callable
from pathlib import Path

from support.hostile.case import Case
from support.images import Entry, directory, layer, symlink

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"


def _above(*entries: Entry) -> Callable[[Path], list[bytes]]:
    """A layer on one that has a directory d, with a file in it."""
    return lambda _canary: [layer([directory("d"), Entry("d/f", b"f")]), layer(entries)]


def _linked(*entries: Entry) -> Callable[[Path], list[bytes]]:
    """A layer that begins with a link l to the canary, on one that has something."""
    return lambda canary: [layer([Entry("base", b"b")]), layer([symlink("l", str(canary)), *entries])]


def _has(*names: str) -> Callable[[Path, Path], None]:
    def check(root: Path, _canary: Path) -> None:
        assert {path.name for path in root.iterdir()} == set(names)

    return check


_NO_NAME = "hides no name"

WHITEOUTS: tuple[Case, ...] = (
    Case("a whiteout of ..", _above(Entry(".wh...")), _NO_NAME),
    Case("a whiteout of .", _above(Entry(".wh..")), _NO_NAME),
    Case("a whiteout of nothing", _above(Entry("d/.wh.")), _NO_NAME),
    Case("a whiteout of .. further down", _above(Entry("d/.wh...")), _NO_NAME),
    Case("a whiteout of .. in the lowest layer", lambda _: [layer([Entry(".wh...")])], _NO_NAME),
    Case("a whiteout climbs", _above(Entry("../.wh.d")), "climbs"),
    Case("a whiteout as a directory", _above(directory(".wh.d"))),
    Case("a whiteout below a whiteout", _above(Entry(".wh.d/f", b"x"))),
    Case("a whiteout through a link", _linked(Entry("l/.wh.kept")), has_below=True),
    Case("a whiteout of a link", _linked(Entry(".wh.l")), check=_has("base", "l"), has_below=True),
    Case("an opaque mark through a link", _linked(Entry(f"l/{OPAQUE}")), has_below=True),
    # As with docker, the root is the one directory of which overlayfs always shows all layers.
    Case("an opaque mark of the root", _above(Entry(OPAQUE)), has_below=True),
    Case("an opaque mark as a link", lambda c: [layer([]), layer([symlink(OPAQUE, str(c))])], has_below=True),
    Case("an opaque mark as a directory with something in it", _above(directory(OPAQUE), Entry(f"{OPAQUE}/x", b"x"))),
    Case("an opaque mark that climbs", _above(Entry(f"d/../../{OPAQUE}")), "climbs"),
    Case("bookkeeping of aufs leads out", _linked(Entry(".wh..wh.plnk/../../x")), "climbs", has_below=True),
    Case(
        "bookkeeping of aufs hides data",
        _above(Entry(".wh..wh.aufs", b"x" * 5000), directory(".wh..wh.plnk"), Entry(".wh..wh.plnk/1.2", b"y")),
        check=_has("d"),
    ),
    Case("a device poses as a whiteout", _above(Entry("d", kind=b"3", device=(0, 0))), has_below=True),
    Case(
        "a device poses as a whiteout in a link's directory",
        _linked(Entry("l/kept", kind=b"3", device=(0, 0))),
        has_below=True,
    ),
)
