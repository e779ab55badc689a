"""A stand-in for the standard dataclasses module that is loaded, and makes classes, many times faster.

The standard one writes the source of each method and compiles it, for every class, at every start: most of the time of
a command that is over in milliseconds. Here the methods are the same functions for all classes, and what is to be known
of a class is looked up when its first object is made. Slots are not made: that would be one more class for each.

It does what the core uses: frozen, order, field(default_factory=…), replace, fields, is_dataclass.
"""

from __future__ import annotations

import sys

from corral.runtime.standins import standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    type _Class = type[Any]


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


standard_of: Any = standard("dataclasses")
MISSING = _Missing()
_SHAPE = "__dataclass_fields__"


class FrozenInstanceError(AttributeError):
    """An attempt to change a frozen instance."""


class Field:
    """One field of a class."""

    __slots__ = ("default", "default_factory", "name", "type")

    def __init__(self, default: object = MISSING, default_factory: Any = MISSING) -> None:
        self.name = ""
        self.type: object = None
        self.default, self.default_factory = default, default_factory

    def __class_getitem__(cls, _item: object) -> _Class:
        return cls


def field(*, default: object = MISSING, default_factory: object = MISSING) -> Any:
    """The default of a field."""
    return Field(default, default_factory)


def fields(thing: object) -> tuple[Field, ...]:
    """The fields of a class or instance."""
    return tuple(_shape(thing if isinstance(thing, type) else type(thing)).fields.values())


def is_dataclass(thing: object) -> bool:
    """Whether a class, or that of an instance, was made here."""
    return hasattr(thing if isinstance(thing, type) else type(thing), _SHAPE)


def replace(thing: Any, /, **changes: object) -> Any:
    """The same with some members changed."""
    for name in _shape(type(thing)).fields:
        if name not in changes:
            changes[name] = getattr(thing, name)
    return type(thing)(**changes)


def dataclass(
    cls: _Class | None = None,
    /,
    *,
    frozen: bool = False,
    slots: bool = False,
    order: bool = False,
    **more: bool,
) -> _Class | Callable[[_Class], _Class]:
    """The decorator."""

    def wrap(cls: _Class) -> _Class:
        if cls.__module__.partition(".")[0] in sys.stdlib_module_names:
            return _made_by_the_standard_one(cls, frozen=frozen, slots=slots, order=order, **more)
        if more:
            raise TypeError(f"dataclass() got an unexpected argument {min(more)!r}")
        return _made(cls, frozen=frozen, order=order)

    return wrap if cls is None else wrap(cls)


def _made(cls: _Class, *, frozen: bool, order: bool) -> _Class:
    for name, method in _FROZEN if frozen else _PLAIN:
        if name not in cls.__dict__:
            setattr(cls, name, method)
    if order:
        for name, method in _ORDER:
            setattr(cls, name, method)
    setattr(cls, _SHAPE, None)
    return cls


def _made_by_the_standard_one(cls: _Class, **options: bool) -> _Class:
    """What Python's own modules make, as traceback does since 3.14, may use all that there is."""
    for name, value in list(vars(cls).items()):
        if isinstance(value, Field):
            given = {key: getattr(value, key) for key in ("default", "default_factory")}
            setattr(cls, name, standard_of("field")(**{key: one for key, one in given.items() if one is not MISSING}))
    made: _Class = standard_of("dataclass")(**options)(cls)
    return made


class _Shape:
    """What is known of a class."""

    def __init__(self, cls: _Class) -> None:
        self.fields: dict[str, Field] = {}
        for base in reversed(cls.__mro__[1:]):
            if _SHAPE in base.__dict__:
                self.fields |= _shape(base).fields
        self.fields |= _own_fields(cls)
        self.names = self.fields.keys()
        self.factories = {
            name: each.default_factory for name, each in self.fields.items() if each.default_factory is not MISSING
        }
        self.required = {name for name, each in self.fields.items() if each.default is MISSING} - self.factories.keys()


def _shape(cls: _Class) -> _Shape:
    shape: _Shape | None = cls.__dict__.get(_SHAPE)
    if shape is None:
        shape = _Shape(cls)
        setattr(cls, _SHAPE, shape)
    return shape


def _own_fields(cls: _Class) -> dict[str, Field]:
    found: dict[str, Field] = {}
    for name, kind in cls.__annotations__.items():
        if getattr(kind, "__origin__", None) is _class_var():
            continue
        value = cls.__dict__.get(name, MISSING)
        each = value if isinstance(value, Field) else Field(value)
        each.name, each.type = name, kind
        if isinstance(value, Field):  # the class shows the default, if there is one
            if each.default is MISSING:
                delattr(cls, name)
            else:
                setattr(cls, name, each.default)
        found[name] = each
    return found


def _class_var() -> object:
    typing = sys.modules.get("typing")
    return None if typing is None else typing.ClassVar


def _init(self: object, *args: object, **members: object) -> None:
    """What was given goes into the object; a default stays with the class."""
    shape = _shape(type(self))
    if args:
        if len(args) > len(shape.names):
            raise TypeError(f"{type(self).__name__}() takes {len(shape.names)} arguments but {len(args)} were given")
        given = dict(zip(shape.names, args, strict=False))
        if twice := given.keys() & members.keys():
            raise TypeError(f"{type(self).__name__}() got multiple values for argument {min(twice)!r}")
        members |= given
    for name, factory in shape.factories.items():
        if name not in members:
            members[name] = factory()
    if missing := shape.required - members.keys():
        raise TypeError(f"{type(self).__name__}() missing required argument: {min(missing)!r}")
    if unknown := members.keys() - shape.names:
        raise TypeError(f"{type(self).__name__}() got an unexpected argument {min(unknown)!r}")
    vars(self).update(members)
    if (after := getattr(self, "__post_init__", None)) is not None:
        after()


def _values(self: object) -> tuple[object, ...]:
    return tuple([getattr(self, name) for name in _shape(type(self)).names])


def _equal(self: object, other: object) -> Any:
    if type(other) is not type(self):
        return NotImplemented
    return _values(self) == _values(other)


def _hash_of(self: object) -> int:
    return hash(_values(self))


def _repr(self: object) -> str:
    members = ", ".join(f"{name}={getattr(self, name)!r}" for name in _shape(type(self)).names)
    return f"{type(self).__qualname__}({members})"


def _refuse(_self: object, name: str, *_: object) -> None:
    raise FrozenInstanceError(f"cannot change field {name!r}")


def _compare(how: str) -> Callable[[object, object], Any]:
    def compare(self: object, other: object) -> Any:
        if type(other) is not type(self):
            return NotImplemented
        return getattr(_values(self), how)(_values(other))

    return compare


_COMMON: tuple[tuple[str, Any], ...] = (("__init__", _init), ("__eq__", _equal), ("__repr__", _repr))
_PLAIN = (*_COMMON, ("__hash__", None))
_FROZEN = (*_COMMON, ("__hash__", _hash_of), ("__setattr__", _refuse), ("__delattr__", _refuse))
_ORDER = tuple((how, _compare(how)) for how in ("__lt__", "__le__", "__gt__", "__ge__"))

__getattr__ = standard_of
