"""A stand-in for ctypes: its part in C, and those types and libraries that corral.kernel uses."""

from __future__ import annotations

import sys
from _ctypes import (
    FUNCFLAG_CDECL,
    FUNCFLAG_PYTHONAPI,
    FUNCFLAG_USE_ERRNO,
    CFuncPtr,
    _SimpleCData,
    addressof,
    byref,
    dlopen,
    get_errno,
    set_errno,
    sizeof,
)

from corral.runtime.standins import standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["addressof", "byref", "get_errno", "set_errno", "sizeof"]

# A package, as the standard one is: since Python 3.14 its part in C imports a submodule when a structure is made.
__path__ = [f"{place}/ctypes" for place in sys.path]


class c_int(_SimpleCData):  # type: ignore[type-arg]  # noqa: N801 - the names are those of ctypes
    """Of C."""

    _type_ = "i"


class c_uint(_SimpleCData):  # type: ignore[type-arg]  # noqa: N801
    """Of C."""

    _type_ = "I"


class c_long(_SimpleCData):  # type: ignore[type-arg]  # noqa: N801
    """Of C."""

    _type_ = "l"


class c_ulong(_SimpleCData):  # type: ignore[type-arg]  # noqa: N801
    """Of C."""

    _type_ = "L"


class c_char_p(_SimpleCData):  # type: ignore[type-arg]  # noqa: N801
    """Of C."""

    _type_ = "z"


class c_void_p(_SimpleCData):  # type: ignore[type-arg]  # noqa: N801
    """Of C."""

    _type_ = "P"


c_int32, c_uint32, c_int64, c_uint64, c_size_t, c_ssize_t = c_int, c_uint, c_long, c_ulong, c_ulong, c_long
"""As on both machines that the core runs on."""


class CDLL:
    """A library, and its functions by name; each time one is asked for it has prototypes of its own."""

    _flags = FUNCFLAG_CDECL

    def __init__(self, name: str | None, *, use_errno: bool = False) -> None:
        """Load it, or be what is loaded already."""
        flags = self._flags | (FUNCFLAG_USE_ERRNO if use_errno else 0)
        self._handle = dlopen(name, 0)  # type: ignore[arg-type]  # as the standard one does
        self._function: Any = type("_FuncPtr", (CFuncPtr,), {"_flags_": flags, "_restype_": c_int})

    def __getitem__(self, name: str) -> CFuncPtr:
        """A function."""
        made: CFuncPtr = self._function((name, self))
        return made


class PyDLL(CDLL):
    """A library during whose calls the interpreter's lock stays held."""

    _flags = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI


__getattr__ = standard("ctypes")
