"""A stand-in for collections.abc: names for annotations, each the real class only to who does more with it."""

from __future__ import annotations

from corral.runtime.standins import standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_GenericAlias: Any = type(list[int])
_real: Any = standard("_collections_abc")


class _Later:
    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: list[type] = []

    def register(self, cls: type) -> type:
        """As libraries in C do with their types when they are loaded."""
        self._waiting.append(cls)
        return cls

    def _class(self) -> Any:
        real = _real(self._name)
        while self._waiting:
            real.register(self._waiting.pop())
        return real

    def __getitem__(self, items: Any) -> Any:
        return _GenericAlias(self, items)

    def __mro_entries__(self, _bases: object) -> tuple[Any, ...]:
        return (self._class(),)

    def __instancecheck__(self, thing: object) -> bool:
        return isinstance(thing, self._class())

    def __subclasscheck__(self, cls: type) -> bool:
        return issubclass(cls, self._class())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._class(), name)


Callable, Collection, Generator, Iterable = map(_Later, ("Callable", "Collection", "Generator", "Iterable"))
Iterator, Mapping, MutableMapping = map(_Later, ("Iterator", "Mapping", "MutableMapping"))
MutableSequence, Sequence, Set = map(_Later, ("MutableSequence", "Sequence", "Set"))

__getattr__ = _real
