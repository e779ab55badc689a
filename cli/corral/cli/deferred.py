"""Modules that the command's libraries import but that hardly any verb uses: each is loaded once it is used.

They are a third of what `corral ps` would load. The interpreter's own LazyLoader loads a module when it is imported
for the second time, as most are, and not when it is used.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader

DEFERRED = frozenset(
    {
        # gRPC's form for asyncio, and what its library imports for that alone.
        "asyncio",
        "grpc.aio",
        "pkgutil",
        "socket",
        # protobuf's messages in Python, in place of which there are those in C; with them go pickle and a text format.
        "google.protobuf.internal.python_message",
        "calendar",
        # For --format json.
        "json",
        # Of these, logging and click use what shows an exception, and what indents a text.
        "ast",
        "tokenize",
        "traceback",
    }
)


class _Loader:
    """Leaves a module empty until it is used."""

    def __init__(self, loader: "Loader") -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Deferred


class _Deferred(ModuleType):
    def __getattribute__(self, name: str) -> object:
        """Loads it, unless it is only imported again. Another thread waits, what it imports itself does not."""
        get = super().__getattribute__
        spec = get("__spec__")
        if name == "__spec__":
            return spec
        with spec.loader_state:
            if isinstance(spec.loader, _Loader):
                spec.loader = self.__loader__ = spec.loader.loader
                spec.loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
        return get(name)


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: "Sequence[str] | None" = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As the interpreter finds it, but for the loader."""
        if name not in DEFERRED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # by its methods it is one
            spec.loader_state = RLock()
        return spec


def defer() -> None:
    """From now on."""
    sys.meta_path.insert(0, _Finder)
