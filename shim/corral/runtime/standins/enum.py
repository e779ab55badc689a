"""A stand-in for enum: Enum, with plain values."""

from __future__ import annotations

from corral.runtime.standins import standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


class EnumType(type):
    """What the class of an enumeration can do."""

    _members: dict[str, Enum]
    _by_value: dict[object, Enum]

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> EnumType:
        """Make each plain name of the body a member."""
        plain = {key: value for key, value in body.items() if not key.startswith("_") and not hasattr(value, "__get__")}
        made = super().__new__(cls, name, bases, {key: value for key, value in body.items() if key not in plain})
        made._members, made._by_value = {}, {}
        for key, value in plain.items():
            if (member := made._by_value.get(value)) is None:
                member = made._by_value[value] = _member(made, key, value)
            made._members[key] = member
            setattr(made, key, member)
        return made

    def __call__(cls, value: object) -> Enum:
        """The member of that value."""
        found = cls._by_value.get(value)
        if found is None:
            raise ValueError(f"{value!r} is not a valid {cls.__qualname__}")
        return found

    def __getitem__(cls, name: str) -> Enum:
        """The member of that name."""
        return cls._members[name]

    def __iter__(cls) -> Iterator[Enum]:
        """Every member, in the order of the body."""
        return iter(cls._by_value.values())

    def __len__(cls) -> int:
        """How many there are."""
        return len(cls._by_value)


def _member(cls: Any, name: str, value: object) -> Enum:
    made: Enum = object.__new__(cls)
    made.name, made.value = name, value
    return made


class Enum(metaclass=EnumType):
    """An enumeration: its members are its instances."""

    name: str
    value: object

    def __repr__(self) -> str:
        """As the standard one's."""
        return f"<{type(self).__name__}.{self.name}: {self.value!r}>"

    def __str__(self) -> str:
        """As the standard one's."""
        return f"{type(self).__name__}.{self.name}"


__getattr__ = standard("enum")
