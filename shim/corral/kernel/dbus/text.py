"""Values as a person writes them: GVariant's text format, less what it leaves to guess. Pure.

    true   5   -3   0x1f   1.5   'text'   [1, 2]   ('a', 5)   {'k': 1}   <5>      int32 and double unless it says more
    uint64 5   objectpath '/a'   @as []   @a(ss) [('/dev/null', 'rw')]

Of an array the first element tells the type of the others; an empty one needs to be told.
Source: GLib, "GVariant Text Format".
"""

from typing import Any

from corral.kernel.dbus.marshalling import Variant, marshal, split, split_entry

_NAMES = "boolean byte int16 uint16 int32 uint32 int64 uint64 double string objectpath signature"
_KEYWORDS = dict(zip(_NAMES.split(), "bynqiuxtdsog", strict=True))
_BASIC = frozenset(_KEYWORDS.values())
_DEEPEST = 64
"""Of values in values, as in a message."""
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_CODE_POINTS = {"u": 4, "U": 8}
_SPACE = " \t\n\r\f\v"
_IN_WORDS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-._")


def parse(text: str) -> Variant:
    """The value that a text stands for. Raises ValueError saying what is wrong with it, and where.

    >>> parse("uint64 5"), parse("[1, 2]")
    (Variant(signature='t', value=5), Variant(signature='ai', value=[1, 2]))
    """
    parser = _Parser(text)
    kind, value = parser.value("")
    parser.space()
    if parser.at < len(text):
        raise parser.error("nothing more is expected")
    marshal(kind, (value,))  # is in the range of its type
    return Variant(kind, value)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self.at = 0
        self._depth = 0

    def error(self, why: str) -> ValueError:
        return ValueError(f"{self._text!r}, at {self.at}: {why}")

    def space(self) -> None:
        while self._text[self.at : self.at + 1] and self._text[self.at] in _SPACE:
            self.at += 1

    def _next(self) -> str:
        """The next character that is no space; it stays."""
        self.space()
        return self._text[self.at : self.at + 1]

    def _take(self, wanted: str) -> bool:
        if self._next() != wanted:
            return False
        self.at += 1
        return True

    def _expect(self, wanted: str) -> None:
        if not self._take(wanted):
            raise self.error(f"{wanted!r} is expected")

    def _word(self) -> str:
        begin = self.at
        while self._text[self.at : self.at + 1] in _IN_WORDS:
            self.at += 1
        return self._text[begin : self.at]

    def value(self, wanted: str) -> tuple[str, Any]:
        """A value with its type; wanted: the one it has to have, if that is known."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self.error("too deep")
        found = self._value(wanted)
        self._depth -= 1
        return found

    def _value(self, wanted: str) -> tuple[str, Any]:
        first = self._next()
        if first == "@":
            return self._annotated(wanted)
        if first and first in "'\"":
            return self._typed(wanted, "s", "og"), self._string()
        if first == "[":
            return self._array(wanted)
        if first == "(":
            return self._tuple(wanted)
        if first == "{":
            return self._dictionary(wanted)
        if first == "<":
            self.at += 1
            kind, value = self.value("")
            self._expect(">")
            return self._typed(wanted, "v"), Variant(kind, value)
        return self._bare(wanted, self._word())

    def _typed(self, wanted: str, default: str, others: str = "") -> str:
        if wanted and wanted != default and wanted not in others:
            raise self.error(f"a value of type {wanted!r} is expected")
        return wanted or default

    def _annotated(self, wanted: str) -> tuple[str, Any]:
        begin = self.at = self.at + 1
        while self._text[self.at : self.at + 1] not in ("", *_SPACE):
            self.at += 1
        kind = self._text[begin : self.at]
        if len(split(kind)) != 1:
            raise self.error(f"{kind!r} is not one type")
        return self.value(self._typed(wanted, kind))

    def _bare(self, wanted: str, word: str) -> tuple[str, Any]:
        if word in ("true", "false"):
            return self._typed(wanted, "b"), word == "true"
        if word in _KEYWORDS:
            return self.value(self._typed(wanted, _KEYWORDS[word]))
        floating = wanted == "d" or not (wanted or _is_integer(word))
        try:
            number = float(word) if floating else int(word, 0 if "x" in word.lower() else 10)
        except ValueError:
            raise self.error(f"{word!r} is not a value") from None
        return self._typed(wanted, "d" if floating else "i", "ynqiuxtd"), number

    def _string(self) -> str:
        quote = self._text[self.at]
        self.at += 1
        found = []
        while (character := self._text[self.at : self.at + 1]) != quote:
            self.at += 1
            if not character:
                raise self.error("the string does not end")
            found.append(self._escaped() if character == "\\" else character)
        self.at += 1
        return "".join(found)

    def _escaped(self) -> str:
        letter = self._text[self.at : self.at + 1]
        self.at += 1
        count = _CODE_POINTS.get(letter, 0)
        if not count:
            return _ESCAPES.get(letter, letter)
        digits = self._text[self.at : self.at + count]
        self.at += count
        try:
            return chr(int(digits, 16))
        except (ValueError, OverflowError):
            raise self.error(f"{digits!r} is not a character") from None

    def _array(self, wanted: str) -> tuple[str, list[Any] | bytes]:
        if wanted and wanted[0] != "a":
            raise self.error(f"a value of type {wanted!r} is expected")
        kind = wanted[1:]
        found: list[Any] = []
        self._expect("[")
        while not self._take("]"):
            if found:
                self._expect(",")
            kind, value = self.value(kind)
            found.append(value)
        if not kind:
            raise self.error("an empty array needs its type, as in @as []")
        return f"a{kind}", bytes(found) if kind == "y" else found

    def _tuple(self, wanted: str) -> tuple[str, tuple[Any, ...]]:
        kinds = split(wanted[1:-1]) if wanted[:1] == "(" else []
        if wanted and not kinds:
            raise self.error(f"a value of type {wanted!r} is expected")
        found: list[tuple[str, Any]] = []
        self._expect("(")
        while not self._take(")"):
            if found:
                self._expect(",")
                if self._take(")"):  # of one element: (5,)
                    break
            found.append(self.value(kinds[len(found)] if len(found) < len(kinds) else ""))
        kind = f"({''.join(each for each, _ in found)})"
        return self._typed(wanted, kind), tuple(value for _, value in found)

    def _dictionary(self, wanted: str) -> tuple[str, dict[Any, Any]]:
        if wanted and wanted[:2] != "a{":
            raise self.error(f"a value of type {wanted!r} is expected")
        key_kind, value_kind = split_entry(wanted[1:]) if wanted else ("", "")
        found: dict[Any, Any] = {}
        self._expect("{")
        while not self._take("}"):
            if found:
                self._expect(",")
            key_kind, key = self.value(key_kind)
            if key_kind not in _BASIC:
                raise self.error(f"a key can't be of type {key_kind!r}")
            self._expect(":")
            value_kind, found[key] = self.value(value_kind)
        if not key_kind:
            raise self.error("an empty dictionary needs its type, as in @a{sv} {}")
        return f"a{{{key_kind}{value_kind}}}", found


def _is_integer(word: str) -> bool:
    digits = word.lstrip("+-")
    return digits.isdecimal() or digits[:2].lower() == "0x"
