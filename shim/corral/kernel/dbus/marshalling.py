"""D-Bus values and messages as bytes, and back. Pure.

    type             in Python            type          in Python
    y n q i u x t h  int                  a…            list; ay is bytes
    b                bool                 a{…}          dict
    d                float                (…)           tuple
    s o g            str                  v             Variant

Every value begins at a multiple of its type's alignment, counted from the beginning of the message.

Source: D-Bus Specification "Type System", "Marshaling (Wire Format)", "Message Protocol".
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4

LONGEST_MESSAGE = 1 << 27
_LONGEST_ARRAY = 1 << 26
_LONGEST_SIGNATURE = 255
_DEEPEST = 32
"""Of arrays in arrays, and of structs in structs; of variants, which may hold both, twice as many of anything."""

_FIXED = {"y": "B", "b": "I", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d", "h": "I"}
_ALIGNMENT = {kind: struct.calcsize(code) for kind, code in _FIXED.items()}
_ALIGNMENT |= dict(zip("soagv({", (4, 4, 4, 1, 1, 8, 8), strict=True))
_BASIC = frozenset("ybnqiuxtdhsog")
_ORDERS = {ord("l"): "<", ord("B"): ">"}

_HEADER = "yyyyuua(yv)"
_SHORTEST = 16
"""What is to be read of a message to know how long it is."""
_VERSION = 1
_FIELDS = ("path", "interface", "member", "error_name", "reply_serial", "destination", "sender", "signature")
"""Header fields by their codes, which begin at 1."""
_FIELD_TYPES = dict(zip(_FIELDS, "osssussg", strict=True))
_REQUIRED = {
    METHOD_CALL: ("path", "member"),
    METHOD_RETURN: ("reply_serial",),
    ERROR: ("error_name", "reply_serial"),
    SIGNAL: ("path", "interface", "member"),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A value that brings its type along."""

    signature: str
    """One complete type."""
    value: Any


@dataclass(frozen=True, slots=True)
class Message:
    """A message; "" or 0 stands for a header field that is not there."""

    kind: int
    serial: int
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    """Of the body."""
    body: tuple[Any, ...] = ()
    flags: int = 0


def split(signature: str) -> list[str]:
    """The single complete types of a signature. Raises ValueError for one that is none.

    >>> split("sa{sv}(ii)")
    ['s', 'a{sv}', '(ii)']
    """
    if len(signature) > _LONGEST_SIGNATURE:
        raise ValueError("D-Bus signature: longer than 255 bytes")
    return list(_split(signature))


def _split(signature: str) -> Iterator[str]:
    at = 0
    while at < len(signature):
        end = _end_of_type(signature, at, 0, 0)
        yield signature[at:end]
        at = end


def _end_of_type(signature: str, at: int, arrays: int, structs: int) -> int:
    """Where the complete type ends that begins at a position."""
    kind = signature[at : at + 1]
    if arrays > _DEEPEST or structs > _DEEPEST:
        raise ValueError(f"D-Bus signature {signature!r}: too deep")
    if (kind and kind in _BASIC) or kind == "v":
        return at + 1
    if kind == "a":
        if signature[at + 1 : at + 2] == "{":
            return _end_of_entry(signature, at + 1, arrays + 1, structs + 1)
        return _end_of_type(signature, at + 1, arrays + 1, structs)
    if kind != "(" or signature[at + 1 : at + 2] == ")":
        raise ValueError(f"D-Bus signature {signature!r}: no type at {at}")
    at += 1
    while signature[at : at + 1] != ")":
        at = _end_of_type(signature, at, arrays, structs + 1)
    return at + 1


def _end_of_entry(signature: str, at: int, arrays: int, structs: int) -> int:
    """A dict entry has a basic key and one value, and is in an array only."""
    if signature[at + 1 : at + 2] not in _BASIC or not signature[at + 1 : at + 2]:
        raise ValueError(f"D-Bus signature {signature!r}: a key must be of a basic type")
    end = _end_of_type(signature, at + 2, arrays, structs)
    if signature[end : end + 1] != "}":
        raise ValueError(f"D-Bus signature {signature!r}: an entry has one key and one value")
    return end + 1


def marshal(signature: str, values: Sequence[Any], *, order: str = "<") -> bytes:
    """Values of the types of a signature, as bytes. order: "<" is little endian, ">" big.

    Raises ValueError for a value that is not of its type.
    """
    kinds = split(signature)
    if len(kinds) != len(values):
        raise ValueError(f"D-Bus signature {signature!r}: {len(kinds)} values are wanted, not {len(values)}")
    writer = _Writer(order)
    for kind, value in zip(kinds, values, strict=True):
        try:
            writer.put(kind, value)
        except (struct.error, TypeError, AttributeError) as e:
            raise ValueError(f"{value!r} is not of the D-Bus type {kind!r}: {e}") from None
    return bytes(writer.out)


class _Writer:
    def __init__(self, order: str) -> None:
        self.out = bytearray()
        self._order = order

    def _pad(self, alignment: int) -> None:
        self.out += bytes(-len(self.out) % alignment)

    def put(self, kind: str, value: Any) -> None:
        first = kind[0]
        self._pad(_ALIGNMENT[first])
        if first in _FIXED:
            if (first == "b") != isinstance(value, bool):
                raise TypeError("a truth value is one, and no number is")
            self.out += struct.pack(self._order + _FIXED[first], value)
        elif first in "sog":
            self._text(first, value)
        elif first == "v":
            self._variant(value)
        elif first == "a":
            self._array(kind[1:], value)
        else:
            self._members(split(kind[1:-1]), value)

    def _text(self, kind: str, value: str) -> None:
        data = value.encode()
        _check_text(kind, value)
        self.out += struct.pack("B" if kind == "g" else self._order + "I", len(data)) + data + b"\0"

    def _variant(self, value: Variant) -> None:
        if len(split(value.signature)) != 1:
            raise ValueError(f"D-Bus signature {value.signature!r}: a variant holds one value")
        self._text("g", value.signature)
        self.put(value.signature, value.value)

    def _array(self, kind: str, value: Any) -> None:
        self.out += bytes(4)
        length_at = len(self.out) - 4
        self._pad(_ALIGNMENT[kind[0]])
        begin = len(self.out)
        if kind == "y":
            self.out += bytes(memoryview(value))
        elif kind[0] == "{":
            for entry in value.items():
                self._pad(8)
                self._members(split_entry(kind), entry)
        else:
            for each in value:
                self.put(kind, each)
        if len(self.out) - begin > _LONGEST_ARRAY:
            raise ValueError("D-Bus array: longer than 64 MiB")
        struct.pack_into(self._order + "I", self.out, length_at, len(self.out) - begin)

    def _members(self, kinds: list[str], values: Any) -> None:
        if len(kinds) != len(values):
            raise TypeError(f"{len(kinds)} members are wanted")
        for kind, value in zip(kinds, values, strict=True):
            self.put(kind, value)


def split_entry(entry: str) -> list[str]:
    """The types of the key and the value of a dict entry, "{sv}"."""
    return [entry[1], entry[2:-1]]


def _check_text(kind: str, text: str) -> None:
    if "\0" in text:
        raise ValueError(f"D-Bus string {text!r}: a NUL can't be in it")
    if kind == "g":
        split(text)
    elif kind == "o" and not _is_path(text):
        raise ValueError(f"{text!r} is not a D-Bus object path")


def _is_path(text: str) -> bool:
    """Source: "Valid Object Paths"."""
    parts = text.split("/")
    return text == "/" or (
        parts[0] == ""
        and len(parts) > 1
        and all(part.isascii() and part.replace("_", "a").isalnum() for part in parts[1:])
    )


def unmarshal(signature: str, data: bytes, *, order: str = "<") -> tuple[Any, ...]:
    """The values that bytes hold, which must be all that they hold. Raises ValueError for bytes that are none."""
    reader = _Reader(data, order)
    values = tuple([reader.take(kind, 0) for kind in split(signature)])
    if reader.at != len(data):
        raise ValueError(f"D-Bus: {len(data) - reader.at} bytes too many")
    return values


class _Reader:
    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order = data, order
        self.at = 0

    def _bytes(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise ValueError("D-Bus: the message ends in the middle of a value")
        return self._data[begin : self.at]

    def _pad(self, alignment: int) -> None:
        if any(self._bytes(-self.at % alignment)):
            raise ValueError("D-Bus: what pads is not zero")

    def _number(self, code: str) -> Any:
        return struct.unpack(self._order + code, self._bytes(struct.calcsize(code)))[0]

    def take(self, kind: str, depth: int) -> Any:
        first = kind[0]
        if depth > 2 * _DEEPEST:
            raise ValueError("D-Bus: too many values within values")
        self._pad(_ALIGNMENT[first])
        if first == "b":
            return self._truth()
        if first in _FIXED:
            return self._number(_FIXED[first])
        if first in "sog":
            return self._text(first)
        if first == "v":
            return self._variant(depth + 1)
        if first == "a":
            return self._array(kind[1:], depth + 1)
        return tuple([self.take(each, depth + 1) for each in split(kind[1:-1])])

    def _truth(self) -> bool:
        number: int = self._number("I")
        if number > 1:
            raise ValueError(f"D-Bus: {number} is no truth value")
        return bool(number)

    def _text(self, kind: str) -> str:
        data = self._bytes(self._number("B" if kind == "g" else "I"))
        if self._bytes(1) != b"\0":
            raise ValueError("D-Bus: a string does not end with NUL")
        text = data.decode()
        _check_text(kind, text)
        return text

    def _variant(self, depth: int) -> Variant:
        signature = self._text("g")
        if len(split(signature)) != 1:
            raise ValueError(f"D-Bus signature {signature!r}: a variant holds one value")
        return Variant(signature, self.take(signature, depth))

    def _array(self, kind: str, depth: int) -> Any:
        length: int = self._number("I")
        if length > _LONGEST_ARRAY:
            raise ValueError("D-Bus array: longer than 64 MiB")
        self._pad(_ALIGNMENT[kind[0]])
        if kind == "y":
            return self._bytes(length)
        end = self.at + length
        entries = split_entry(kind) if kind[0] == "{" else []
        found: list[Any] = []
        while self.at < end:
            if entries:
                self._pad(8)
                found.append([self.take(each, depth + 1) for each in entries])
            else:
                found.append(self.take(kind, depth))
        if self.at != end:
            raise ValueError("D-Bus array: its last value ends behind it")
        return dict(found) if entries else found


def encode(message: Message) -> bytes:
    """A whole message, little endian. Raises ValueError if something can't be in one."""
    body = marshal(message.signature, message.body)
    fields = [
        (code, Variant(_FIELD_TYPES[name], value))
        for code, name in enumerate(_FIELDS, 1)
        if (value := getattr(message, name))
    ]
    header = (ord("l"), message.kind, message.flags, _VERSION, len(body), message.serial, fields)
    data = marshal(_HEADER, header)
    return data + bytes(-len(data) % 8) + body


def length_of(data: bytes | bytearray) -> int:
    """How long a message is, or at least, by what has come of it. Raises ValueError if it is none."""
    if len(data) < _SHORTEST:
        return _SHORTEST
    order = _ORDERS.get(data[0])
    if order is None or data[3] != _VERSION:
        raise ValueError("D-Bus: this is not a message of version 1")
    body, _, fields = struct.unpack_from(order + "III", data, 4)
    length: int = _SHORTEST + fields + (-fields % 8) + body
    if length > LONGEST_MESSAGE or fields > _LONGEST_ARRAY:
        raise ValueError("D-Bus message: longer than 128 MiB")
    return length


def decode(data: bytes) -> Message:
    """The message that bytes hold: as many as length_of() says. Raises ValueError if they don't."""
    if length_of(data) != len(data):
        raise ValueError("D-Bus: not the bytes of one message")
    order = _ORDERS[data[0]]
    reader = _Reader(data, order)
    _, kind, flags, _, length, serial, fields = [reader.take(each, 0) for each in split(_HEADER)]
    known: dict[str, Any] = {}
    for code, value in fields:
        if 0 < code <= len(_FIELDS):  # a field that is not known is to be ignored
            known[_FIELDS[code - 1]] = _field(_FIELDS[code - 1], value)
    if missing := [name for name in _REQUIRED.get(kind, ()) if not known.get(name)]:
        raise ValueError(f"D-Bus message: it lacks {missing[0]}")
    body = unmarshal(known.get("signature", ""), data[len(data) - length :], order=order)
    return Message(kind=kind, serial=serial, flags=flags, body=body, **known)


def _field(name: str, value: Variant) -> Any:
    if value.signature != _FIELD_TYPES[name]:
        raise ValueError(f"D-Bus message: {name} is of type {value.signature!r}")
    return value.value
