"""A stand-in for the standard dataclasses module that is loaded, and makes classes, many times faster.

The standard one writes the source of each method and compiles it, for every class, at every start: most of the time of
a command that is over in milliseconds. Here the methods are the same functions for all classes, and look the fields up.
That makes them slower to call, which does not matter to a process that makes a few hundred objects.

It does what the core uses: frozen, slots, order, field(default_factory=…), replace, fields, is_dataclass. A test runs
the same classes through both modules.
"""

import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

type _Class = type[Any]


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()
_FACTORY = object()
_FIELDS = "__dataclass_fields__"


class FrozenInstanceError(AttributeError):
    """An attempt to change a frozen instance."""


class Field:
    """One field of a class."""

    __slots__ = ("default", "default_factory", "name", "type")

    def __init__(self, default: object = MISSING, default_factory: object = MISSING) -> None:
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
    return tuple(getattr(thing, _FIELDS).values())


def is_dataclass(thing: object) -> bool:
    """Whether a class, or that of an instance, was made here."""
    return hasattr(thing if isinstance(thing, type) else type(thing), _FIELDS)


def replace(thing: Any, /, **changes: object) -> Any:
    """The same with some members changed."""
    for name in getattr(thing, _FIELDS):
        if name not in changes:
            changes[name] = getattr(thing, name)
    return type(thing)(**changes)


def dataclass(
    cls: _Class | None = None, /, *, frozen: bool = False, slots: bool = False, order: bool = False
) -> _Class | Callable[[_Class], _Class]:
    """The decorator."""

    def wrap(cls: _Class) -> _Class:
        return _made(cls, frozen=frozen, slots=slots, order=order)

    return wrap if cls is None else wrap(cls)


def _made(cls: _Class, *, frozen: bool, slots: bool, order: bool) -> _Class:
    inherited: dict[str, Field] = {}
    for base in reversed(cls.__mro__[1:]):
        inherited.update(base.__dict__.get(_FIELDS, {}))
    own = _own_fields(cls)
    every = inherited | own
    methods = _methods(every)
    if frozen:
        methods |= {"__setattr__": _refuse, "__delattr__": _refuse, "__hash__": _hash_of}
    else:
        methods["__hash__"] = None
    if order:
        methods |= _ORDER
    methods |= {_FIELDS: every, "__match_args__": tuple(every)}
    if not slots:
        for name, method in methods.items():
            if name not in cls.__dict__ or name in ("__hash__", _FIELDS):
                setattr(cls, name, method)
        return cls
    body = {
        name: value
        for name, value in cls.__dict__.items()
        if name not in own and name not in ("__dict__", "__weakref__")
    }
    for name, method in methods.items():
        if name not in body or (name == "__hash__" and body[name] is None):
            body[name] = method
    body["__slots__"] = tuple(name for name in own if name not in inherited)
    body["__qualname__"] = cls.__qualname__
    metaclass: Any = type(cls)
    made: _Class = metaclass(cls.__name__, cls.__bases__, body)
    return made


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


def _methods(every: Mapping[str, Field]) -> dict[str, Any]:
    names = tuple(every)
    count = len(names)
    defaults: dict[str, object] = {}
    factories: dict[str, Any] = {}
    for each in every.values():
        if each.default_factory is not MISSING:
            factories[each.name] = each.default_factory
            defaults[each.name] = _FACTORY
        elif each.default is not MISSING:
            defaults[each.name] = each.default
    known = frozenset(names)
    put = object.__setattr__

    def __init__(self: object, *args: object, **members: object) -> None:  # noqa: N807
        if len(args) > count:
            raise TypeError(f"{type(self).__name__}() takes {count} arguments but {len(args)} were given")
        for name, value in zip(names, args, strict=False):
            if name in members:
                raise TypeError(f"{type(self).__name__}() got multiple values for argument {name!r}")
            put(self, name, value)
        for name in names[len(args) :]:
            if name in members:
                put(self, name, members[name])
                continue
            value = defaults.get(name, MISSING)
            if value is MISSING:
                raise TypeError(f"{type(self).__name__}() missing required argument: {name!r}")
            put(self, name, factories[name]() if value is _FACTORY else value)
        if not members.keys() <= known:
            raise TypeError(f"{type(self).__name__}() got an unexpected argument {min(members.keys() - known)!r}")
        if (after := getattr(self, "__post_init__", None)) is not None:
            after()

    return {"__init__": __init__, "__eq__": _equal, "__repr__": _repr, "__replace__": replace}


def _values(self: object) -> tuple[object, ...]:
    return tuple([getattr(self, name) for name in getattr(self, _FIELDS)])


def _equal(self: object, other: object) -> Any:
    if type(other) is not type(self):
        return NotImplemented
    return _values(self) == _values(other)


def _hash_of(self: object) -> int:
    return hash(_values(self))


def _repr(self: object) -> str:
    members = ", ".join(f"{name}={getattr(self, name)!r}" for name in getattr(self, _FIELDS))
    return f"{type(self).__qualname__}({members})"


def _refuse(_self: object, name: str, *_: object) -> None:
    raise FrozenInstanceError(f"cannot change field {name!r}")


def _compare(how: str) -> Callable[[object, object], Any]:
    def compare(self: object, other: object) -> Any:
        if type(other) is not type(self):
            return NotImplemented
        return getattr(_values(self), how)(_values(other))

    return compare


_ORDER = {how: _compare(how) for how in ("__lt__", "__le__", "__gt__", "__ge__")}


def install() -> None:
    """Be `dataclasses` for what is imported from here on, unless the real one is loaded already."""
    if "dataclasses" not in sys.modules:
        module = types.ModuleType("dataclasses", __doc__)
        for name in (
            "MISSING",
            "Field",
            "FrozenInstanceError",
            "dataclass",
            "field",
            "fields",
            "is_dataclass",
            "replace",
        ):
            setattr(module, name, globals()[name])
        sys.modules["dataclasses"] = module
