"""Tells what is loaded, and in which order: `recorder.main(groups)` in a bare interpreter that has loaded nothing.

A group is what is imported together; the modules that it brings along are in the order in which they were run. What is
built into the interpreter is left out.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    type Loaded = tuple[str, str, str]

_loaded: list[Loaded] = []


class _Loader:
    def __init__(self, loader: Any) -> None:
        self.create_module = loader.create_module
        self._run = loader.exec_module

    def exec_module(self, module: ModuleType) -> None:
        self._run(module)
        _loaded.append((module.__name__, module.__file__ or "", next(iter(getattr(module, "__path__", ())), "")))


class _Finder:
    """Finds as that of paths does, the last one."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec: ModuleSpec | None = sys.meta_path[-1].find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


def main(groups: dict[str, tuple[str, ...]]) -> None:
    """Print, as JSON, for each group [name, file, directory if it is a package] of what was loaded for it."""
    sys.meta_path.insert(-1, _Finder)
    found: dict[str, list[Loaded]] = {}
    for group, names in groups.items():
        for name in names:
            __import__(name)
        if group == "standins":
            sys.modules["corral.runtime.standins"].install()
        found[group] = _loaded.copy()
        _loaded.clear()
    import json

    sys.stdout.write(json.dumps(found))
