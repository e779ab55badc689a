"""JSON to frozen dataclasses and back, driven by their annotations.

A field `no_new_privileges` is `noNewPrivileges` in JSON, and `nonewprivileges` too, as with runc, if there is no
member of the right name. Unknown members are ignored, as runtime-spec wants; a wrong
value is refused by a ValueError that begins with its JSON path (`process.user.uid: …`).
"""

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum

type JSON = bool | int | float | str | list[JSON] | dict[str, JSON] | None
type _Decoder = Callable[[object], object]


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Annotated[int, Range(low, high)]: an integer within bounds, both included."""

    low: int
    high: int


U16 = typing.Annotated[int, Range(0, 2**16 - 1)]
U32 = typing.Annotated[int, Range(0, 2**32 - 1)]
U64 = typing.Annotated[int, Range(0, 2**64 - 1)]
I32 = typing.Annotated[int, Range(-(2**31), 2**31 - 1)]
I64 = typing.Annotated[int, Range(-(2**63), 2**63 - 1)]


class Choice:
    """Annotated[str, Choice(…)]: one of these strings."""

    __slots__ = ("values",)

    def __init__(self, *values: str) -> None:
        self.values = values


class _Dataclass(typing.Protocol):
    __dataclass_fields__: typing.ClassVar[dict[str, "dataclasses.Field[typing.Any]"]]


class _Wrong(Exception):
    """A value is wrong; the path to it grows from the inside out, so that what is right costs no path."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path = ""

    def inside(self, step: str) -> "_Wrong":
        self.path = step + self.path
        return self


def decode[T: _Dataclass](cls: type[T], value: object, path: str = "") -> T:
    """An instance of the dataclass cls from a JSON object. Raises ValueError naming the member that is wrong."""
    try:
        return typing.cast(T, _for_dataclass(cls)(value))
    except _Wrong as e:
        where = (path + e.path).removeprefix(".") or "config.json"
        raise ValueError(f"{where}: {e}") from None


def encode(value: object) -> JSON:
    """The JSON of a dataclass instance (or a part of one); members that hold their default are left out."""
    if type(value) in _PLAIN:
        return typing.cast(JSON, value)
    if isinstance(value, tuple | list):
        return [item if type(item) in _PLAIN else encode(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {
            name: encode(item)
            for field, name, default in _members(typing.cast(type[_Dataclass], type(value)))
            if (item := getattr(value, field)) != default
        }
    if isinstance(value, Enum):
        return encode(value.value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    raise TypeError(f"no JSON form for {type(value).__name__}")


_PLAIN = frozenset((type(None), bool, int, float, str))


@functools.cache
def _members(cls: type[_Dataclass]) -> tuple[tuple[str, str, object], ...]:
    """Of each field its name, that in JSON, and what it holds unless it is given."""
    return tuple((field.name, json_name(field.name), _default(field)) for field in dataclasses.fields(cls))


def _default(field: "dataclasses.Field[object]") -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def json_name(field: str) -> str:
    """The camelCase name of a field; a trailing underscore (a Python keyword's) is dropped."""
    head, *rest = field.rstrip("_").split("_")
    return head + "".join(_ACRONYMS.get(word, word.capitalize()) for word in rest)


_ACRONYMS = {"io": "IO", "oom": "OOM", "id": "ID", "iops": "IOPS", "cpu": "CPU"}


@functools.cache
def _for_dataclass(cls: type[_Dataclass]) -> _Decoder:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [(f.name, json_name(f.name)) for f in dataclasses.fields(cls)]
    names = {name.lower(): name for _, name in fields}
    exact = frozenset(names.values())
    decoders: dict[str, _Decoder] = {}  # made for what a document has: most have a tenth of what they may
    required = [
        json_name(f.name)
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]

    def build(value: object) -> object:
        if not isinstance(value, dict):
            if isinstance(value, cls):  # which no JSON gives: whoever put it there knows it already
                return value
            raise _wrong("an object", value)
        if not exact.issuperset(value):
            value = _respelled(value, names) | value
        for name in required:
            if value.get(name) is None:
                raise _Wrong("missing").inside(f".{name}")
        members: dict[str, object] = {}
        for field, name in fields:
            item = value.get(name)
            if item is not None:  # null stands for absent, as Go's encoder writes it
                if (convert := decoders.get(field)) is None:
                    convert = decoders[field] = _for(hints[field])
                try:
                    members[field] = convert(item)
                except _Wrong as e:
                    raise e.inside(f".{name}") from None
        return cls(**members)

    return build


def _respelled(value: dict[str, object], names: Mapping[str, str]) -> dict[str, object]:
    """Members by their right names, by names in lower case: Go's decoder, and so runc, does not mind the case."""
    return {names[low]: item for name, item in value.items() if (low := name.lower()) in names}


def _for(hint: object) -> _Decoder:
    """The decoder of one annotation."""
    if isinstance(hint, type) and (simple := _SIMPLE.get(hint)):
        return simple
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _for_enum(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _for_dataclass(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not types.NoneType)
        return _for(inner)
    if origin is typing.Annotated:
        limits = arguments[1]
        return _for_choice(limits) if isinstance(limits, Choice) else _for_range(limits)
    if origin is tuple:
        return _strings if arguments[0] is str else _for_tuple(_for(arguments[0]))
    if origin is Mapping:
        return _for_mapping(_for(arguments[1]))
    raise TypeError(f"no decoder for {hint!r}")


def _bool(value: object) -> object:
    if not isinstance(value, bool):
        raise _wrong("true or false", value)
    return value


def _str(value: object) -> object:
    if not isinstance(value, str):
        raise _wrong("a string", value)
    if "\0" in value:
        raise _Wrong("holds a NUL character")
    if not _has_bytes(value):
        raise _Wrong("holds half a character")
    return value


def _has_bytes(text: str) -> bool:
    """Whether the kernel can be given it: JSON may name halves of UTF-16 pairs, most of which are no character."""
    if text.isascii():
        return True
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _int(value: object) -> object:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong("an integer", value)
    return value


_SIMPLE: dict[type, _Decoder] = {bool: _bool, str: _str, int: _int}


def _for_range(limits: Range) -> _Decoder:
    low, high = limits.low, limits.high

    def bounded(value: object) -> object:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong("an integer", value)
        if not low <= value <= high:
            raise _Wrong(f"{value} is not between {low} and {high}")
        return value

    return bounded


def _for_choice(choice: Choice) -> _Decoder:
    def chosen(value: object) -> object:
        if value not in choice.values:
            raise _Wrong(f"{value!r} is none of {', '.join(choice.values)}")
        return value

    return chosen


def _for_enum(cls: type[Enum]) -> _Decoder:
    members: dict[object, Enum] = {member.value: member for member in cls}

    def member(value: object) -> object:
        found = members.get(value) if isinstance(value, str) else None
        if found is None:
            raise _Wrong(f"{value!r} is none of {', '.join(str(m) for m in members)}")
        return found

    return member


def _for_tuple(item: _Decoder) -> _Decoder:
    def many(value: object) -> object:
        if not isinstance(value, list):
            raise _wrong("an array", value)
        items = []
        try:
            for each in value:
                items.append(item(each))  # noqa: PERF401 - how many are done tells where it went wrong
        except _Wrong as e:
            raise e.inside(f"[{len(items)}]") from None
        return tuple(items)

    return many


_any_strings = _for_tuple(_str)


def _strings(value: object) -> object:
    """An array of strings, looked at as a whole: a seccomp profile has hundreds."""
    try:
        fine = isinstance(value, list) and "\0" not in (whole := "".join(value)) and _has_bytes(whole)
    except TypeError:
        fine = False
    return tuple(value) if fine and isinstance(value, list) else _any_strings(value)


def _for_mapping(item: _Decoder) -> _Decoder:
    def mapping(value: object) -> object:
        if not isinstance(value, dict):
            raise _wrong("an object", value)
        members: dict[object, object] = {}
        for key, each in value.items():
            try:
                members[_str(key)] = item(each)
            except _Wrong as e:
                raise e.inside(f".{key}") from None
        return members

    return mapping


def _wrong(wanted: str, value: object) -> _Wrong:
    return _Wrong(f"must be {wanted}, not {type(value).__name__}")
