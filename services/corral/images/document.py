"""Typed reading of JSON that somebody else wrote.

Only what is asked for by name and type is taken; sizes and depth are bounded; every refusal names the place.
"""

import json
from collections.abc import Mapping

from corral.rpc.errors import InvalidArgument

MAX_TEXTS = 100_000


class Document:
    """One JSON object. A key that is missing or null reads as the default, as Go's decoders have it."""

    def __init__(self, fields: Mapping[str, object], where: str) -> None:
        self._fields = fields
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._fields.get(key) is not None

    def text(self, key: str) -> str:
        value = self._fields.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.refusal(key, "is not a string")
        return value

    def required_text(self, key: str) -> str:
        text = self.text(key)
        if not text:
            raise self.refusal(key, "is missing")
        return text

    def integer(self, key: str, *, low: int = 0, high: int = (1 << 63) - 1) -> int:
        value = self._fields.get(key)
        if value is None:
            return 0
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(key, "is not a whole number")
        if not low <= value <= high:
            raise self.refusal(key, f"is not between {low} and {high}")
        return value

    def boolean(self, key: str) -> bool:
        value = self._fields.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.refusal(key, "is neither true nor false")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise self.refusal(key, "is not a list of strings")
        return tuple(str(value) for value in values)

    def words(self, key: str) -> tuple[str, ...]:
        """A list of strings, or one string that stands for a list of one, as old builders wrote it."""
        value = self._fields.get(key)
        return (value,) if isinstance(value, str) else self.texts(key)

    def text_map(self, key: str) -> dict[str, str]:
        fields = self._object(key)
        found = {}
        for name, value in fields.items():
            if not isinstance(value, str):
                raise self.refusal(f"{key}.{name[:80]}", "is not a string")
            found[name] = value
        return found

    def keys(self, key: str) -> tuple[str, ...]:
        """The names of an object that serves as a set, such as {"80/tcp": {}}."""
        return tuple(self._object(key))

    def child(self, key: str) -> "Document | None":
        return None if self._fields.get(key) is None else Document(self._object(key), f"{self.where}: {key}")

    def children(self, key: str, *, at_most: int) -> "list[Document]":
        values = self._list(key)
        if len(values) > at_most:
            raise self.refusal(key, f"has {len(values)} entries; at most {at_most} are taken")
        found = []
        for i, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.refusal(f"{key}[{i}]", "is not an object")
            found.append(Document(value, f"{self.where}: {key}[{i}]"))
        return found

    def refusal(self, key: str, problem: str) -> InvalidArgument:
        return InvalidArgument(f"{self.where}: {key} {problem}", reason="BAD_DOCUMENT")

    def _list(self, key: str) -> list[object]:
        value = self._fields.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.refusal(key, "is not a list")
        if len(value) > MAX_TEXTS:
            raise self.refusal(key, f"has more than {MAX_TEXTS} entries")
        return value

    def _object(self, key: str) -> dict[str, object]:
        value = self._fields.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refusal(key, "is not an object")
        return value


def parse_document(data: bytes, what: str, *, max_bytes: int) -> Document:
    """The JSON object in `data`. Raises InvalidArgument."""
    value = _parse(data, what, max_bytes)
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is not a JSON object", reason="BAD_DOCUMENT")
    return Document(value, what)


def parse_documents(data: bytes, what: str, *, max_bytes: int, at_most: int) -> list[Document]:
    """The JSON list of objects in `data`. Raises InvalidArgument."""
    return Document({"entries": _parse(data, what, max_bytes)}, what).children("entries", at_most=at_most)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Of a key that is there twice readers differ in which one counts, so what one proves another may not have read."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return fields


def _parse(data: bytes, what: str, max_bytes: int) -> object:
    if len(data) > max_bytes:
        raise InvalidArgument(f"{what} has {len(data)} bytes; at most {max_bytes} are taken", reason="BAD_DOCUMENT")
    try:
        value: object = json.loads(data, object_pairs_hook=_object)
        if b"\\u" in data:  # only an escape can name half a character, which no answer of ours could carry
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as e:
        raise InvalidArgument(f"{what} is nested too deeply", reason="BAD_DOCUMENT") from e
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError alike
        raise InvalidArgument(f"{what} is not JSON: {e}", reason="BAD_DOCUMENT") from e
    return value
