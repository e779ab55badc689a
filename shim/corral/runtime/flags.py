"""Flags and arguments: `--name value`, `--name=value`, `-n value`; `--` ends the flags, and where a command of others
follows, so does the first argument that is none.

By hand rather than by argparse, whose import takes longer than starting a container may.
"""

from collections.abc import Mapping, Sequence

from corral.runtime.errors import USAGE_CODE, CommandError

SWITCH, VALUE, MANY = "switch", "value", "many"

type Flags = Mapping[str, str]
"""Name to kind; the name may carry a letter: `bundle,b`."""


class Options:
    """The flags that were given."""

    def __init__(self) -> None:
        self._given: dict[str, list[str]] = {}

    def put(self, name: str, value: str) -> None:
        """Note a flag."""
        self._given.setdefault(name, []).append(value)

    def has(self, name: str) -> bool:
        """Whether it was given at all."""
        return name in self._given

    def on(self, name: str) -> bool:
        """Whether a switch is on."""
        return self.text(name) == "true"

    def text(self, name: str, default: str = "") -> str:
        """The last value."""
        values = self._given.get(name)
        return values[-1] if values else default

    def texts(self, name: str) -> list[str]:
        """All values, in order."""
        return self._given.get(name, [])

    def number(self, name: str, default: int = 0) -> int:
        """The last value as an integer."""
        text = self.text(name)
        if not text:
            return default
        try:
            return int(text)
        except ValueError:
            raise CommandError(f"--{name}: {text!r} is not a number", USAGE_CODE) from None


_SWITCHED = {"true": "true", "false": "false", "1": "true", "0": "false", "t": "true", "f": "false"}


def parse(arguments: Sequence[str], flags: Flags, *, anywhere: bool = False) -> tuple[Options, list[str]]:
    """The flags, and the arguments after them or, if flags may stand anywhere, between them. `help` is always known."""
    names = {"h": "help", "help": "help"}
    kinds = {"help": SWITCH}
    for spelling, kind in flags.items():
        name, _, letter = spelling.partition(",")
        kinds[name] = kind
        names[name] = name
        if letter:
            names[letter] = name
    options, left, rest = Options(), list(arguments), []
    while left:
        word = left.pop(0)
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            rest.append(word)
            if not anywhere:
                break
            continue
        spelling, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if (found := names.get(spelling)) is None:
            if rest:  # a signal of -1, say
                rest.append(word)
                continue
            raise CommandError(f"flag provided but not defined: {word.partition('=')[0]}", USAGE_CODE)
        if kinds[found] == SWITCH:
            if (switched := _SWITCHED.get(value.lower() if equals else "true")) is None:
                raise CommandError(f"{word}: true or false is wanted", USAGE_CODE)
            value = switched
        elif not equals:
            if not left:
                raise CommandError(f"flag needs an argument: {word}", USAGE_CODE)
            value = left.pop(0)
        options.put(found, value)
    return options, [*rest, *left]
