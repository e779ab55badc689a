"""A stand-in for os: posix, which most of it is, and of the rest what the core uses."""

from __future__ import annotations

import posix
import sys
from posix import *  # noqa: F403
from posix import _exit, fspath, mkdir

from corral.runtime.standins import standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from os import PathLike

    type _Name = str | bytes | PathLike[str] | PathLike[bytes]

sys.modules["os"] = sys.modules[__name__]  # for what is imported next

import posixpath as path  # noqa: E402

sys.modules["os.path"] = path

__all__ = ["_exit", "environ", "fsdecode", "fsencode", "makedirs", "path"]

name = "posix"
curdir, pardir, sep, defpath, devnull = path.curdir, path.pardir, path.sep, path.defpath, path.devnull
_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


def fsencode(filename: _Name) -> bytes:
    """The bytes of a name."""
    given = fspath(filename)
    return given.encode(_ENCODING, _ERRORS) if isinstance(given, str) else given


def fsdecode(filename: _Name) -> str:
    """The text of a name."""
    given = fspath(filename)
    return given.decode(_ENCODING, _ERRORS) if isinstance(given, bytes) else given


environ = {fsdecode(key): fsdecode(value) for key, value in posix.environ.items()}  # type: ignore[misc]
"""Changes of it stay here."""


def makedirs(directory: str, mode: int = 0o777, exist_ok: bool = False) -> None:
    """Make a directory, and those above it that are missing with the default mode."""
    above = path.dirname(directory.rstrip("/"))
    if above and not path.exists(above):
        makedirs(above, exist_ok=True)
    try:
        mkdir(directory, mode)
    except OSError:
        if not exist_ok or not path.isdir(directory):
            raise


__getattr__ = standard("os")
