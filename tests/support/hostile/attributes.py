"""Attributes and modes that would mean something to the host."""

import os
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from support.hostile.case import Case
from support.images import Entry, directory, layer
from support.tars import archive, member, pax

OVERLAY = ("redirect", "metacopy", "opaque", "origin", "impure", "nlink", "upper", "protattr", "whiteouts")


def _with(attributes: Mapping[bytes, bytes], kind: bytes = b"0") -> Callable[[Path], list[bytes]]:
    """A layer of one file or directory that has these, above one with a secret."""
    records = {b"SCHILY.xattr." + name: value for name, value in attributes.items()}
    upper = archive(pax(records), member(b"x", b"" if kind == b"5" else b"own", kind=kind))
    return lambda _canary: [layer([Entry("secret", b"secret"), directory("d"), Entry("d/secret", b"s")]), upper]


def _has_none(root: Path, _canary: Path) -> None:
    """Overlayfs would not show its own ones anyway, but would follow them: the content tells."""
    names = os.listxattr(root / "x", follow_symlinks=False)
    assert not [name for name in names if "overlay" in name or name.startswith(("security.", "trusted."))]
    if (root / "x").is_dir():
        assert not list((root / "x").iterdir())
    else:
        assert (root / "x").read_bytes() == b"own"


def _every(prefix: bytes, value: Callable[[str], bytes]) -> dict[bytes, bytes]:
    return {prefix + name.encode(): value(name) for name in OVERLAY}


def _value(name: str) -> bytes:
    return {"redirect": b"/secret", "metacopy": b"", "opaque": b"y"}.get(name, b"y")


def _keeps_setuid(root: Path, _canary: Path) -> None:
    """It is the image's own; nobody of the host's users reaches it."""
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o6755


_CANNOT = "cannot be set"
_TOO_OLD = struct.pack("<IIIII", 0x09000000, 1, 0, 0, 0)

ATTRIBUTES: tuple[Case, ...] = (
    Case("attributes of overlayfs on a file", _with(_every(b"trusted.overlay.", _value)), check=_has_none),
    Case("attributes of overlayfs on a directory", _with(_every(b"trusted.overlay.", _value), b"5"), check=_has_none),
    Case("attributes of a user's overlayfs on a file", _with(_every(b"user.overlay.", _value)), check=_has_none),
    Case(
        "attributes of a user's overlayfs on a directory",
        _with(_every(b"user.overlay.", _value), b"5"),
        check=_has_none,
    ),
    Case("nested attributes of overlayfs", _with({b"trusted.overlay.overlay.redirect": b"/d"}, b"5"), check=_has_none),
    Case("a redirect that climbs", _with({b"trusted.overlay.redirect": b"../../etc"}, b"5"), check=_has_none),
    Case(
        "labels of security modules",
        _with(
            {b"security.selinux": b"u:r:t", b"security.ima": b"\1", b"security.evm": b"\2", b"security.SMACK64": b"_"}
        ),
        check=_has_none,
    ),
    Case("attributes of trusted programs", _with({b"trusted.md5": b"x", b"system.nfs4_acl": b"x"}), check=_has_none),
    Case("a capability that is none", _with({b"security.capability": b"junk"}), _CANNOT),
    Case("a capability of a revision to come", _with({b"security.capability": _TOO_OLD}), _CANNOT),
    Case("a capability of four gibibytes", _with({b"security.capability": b"\2" * 65_000}), _CANNOT),
    Case("an access list that is none", _with({b"system.posix_acl_access": b"\2\0\0\0junk"}), _CANNOT),
    Case(
        "an access list of ten thousand",
        _with({b"system.posix_acl_default": b"\2\0\0\0" + b"\1\0\7\0" * 16_000}, b"5"),
        _CANNOT,
    ),
    Case("an attribute of 70,000 bytes", _with({b"user.a": bytes(70_000)}), "extended attribute of 70000 bytes"),
    Case("an attribute without a name", _with({b"user.": b"x"}), _CANNOT),
    Case("an attribute with a name of 300 bytes", _with({b"user." + b"n" * 300: b"x"}), _CANNOT),
    Case("an attribute with a NUL byte in its name", _with({b"user.a\0b": b"x"}), _CANNOT),
    Case(
        "an attribute with control characters in its name", _with({b"user.\x1b]0;\x07\n" + b"n" * 300: b"x"}), _CANNOT
    ),
    Case("an attribute that is not UTF-8", _with({b"user.\xff": b"\xff"})),
    Case("a setuid program", lambda _: [layer([Entry("su", b"#!", 0o6755)])], check=_keeps_setuid),
    Case("a mode of all bits", lambda _: [archive(member(b"f", b"x", mode=b"7777777\0"))]),
)
