"""Members of a JSON object that somebody else sent, each checked for what it must be."""

from collections.abc import Mapping, Sequence

from corral.shim.errors import ShimError

type Fields = Mapping[str, object]


def wrong(name: str, wanted: str) -> ShimError:
    """The error for a member that is not what it must be."""
    return ShimError("invalid_argument", f"{name}: must be {wanted}")


def _value[T](fields: Fields, name: str, kind: type[T], wanted: str, default: T | None) -> T:
    value = fields.get(name)
    if value is None:
        if default is None:
            raise ShimError("invalid_argument", f"{name}: missing")
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong(name, wanted)
    return value


def text(fields: Fields, name: str, default: str | None = None) -> str:
    """A string member; without a default it must be there."""
    value = _value(fields, name, str, "a string", default)
    if "\0" in value:
        raise wrong(name, "a string without NUL")
    return value


def flag(fields: Fields, name: str) -> bool:
    """A boolean member, false if absent."""
    return _value(fields, name, bool, "true or false", False)


def integer(fields: Fields, name: str, default: int | None = None) -> int:
    """An integer member; without a default it must be there."""
    return _value(fields, name, int, "an integer", default)


def mapping(fields: Fields, name: str) -> Fields:
    """An object, empty if absent."""
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(name, "an object")
    return value


def array(fields: Fields, name: str) -> Sequence[object]:
    """An array, empty if absent."""
    value = fields.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong(name, "an array")
    return value


def strings(fields: Fields, name: str) -> tuple[str, ...]:
    """An array of strings, empty if absent."""
    return tuple(text({name: item}, name) for item in array(fields, name))
