"""Stand-ins for modules of the standard library that are slow to load, most of it for what is not used here.

To make one class takes as long as to call a hundred functions, and these modules make dozens. A stand-in does what the
core uses of its module; whatever else somebody asks it for comes from the standard module, which is loaded then. The
tests have both do the same.
"""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_NAMES = ("os", "types", "typing", "collections", "functools", "contextlib", "dataclasses", "enum", "signal", "ctypes")
_standard: dict[str, ModuleType] = {}


def install() -> None:
    """Be these modules for what is imported from here on, unless the real ones are loaded already."""
    for name in _NAMES:
        if name not in sys.modules:
            sys.modules[name] = import_module(f"{__name__}.{name}")


def standard(name: str) -> Callable[[str], object]:
    """The __getattr__ of a stand-in: what the standard module of that name has."""

    def get(attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if name not in _standard:
            _standard[name] = _load(name)
        value: object = getattr(_standard[name], attribute)
        return value

    return get


def _load(name: str) -> ModuleType:
    stand_in = sys.modules.pop(name, None)
    try:
        return import_module(name)
    finally:
        if stand_in is not None:
            sys.modules[name] = stand_in
