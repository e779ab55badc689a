"""Flags in front of arguments: `--name value`, `--name=value`, `-n value`; the first argument that is none ends them.

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


def parse(arguments: Sequence[str], flags: Flags) -> tuple[Options, list[str]]:
    """The flags, and the arguments after them. `help` is known everywhere."""
    names = {"h": "help", "help": "help"}
    kinds = {"help": SWITCH}
    for spelling, kind in flags.items():
        name, _, letter = spelling.partition(",")
        kinds[name] = kind
        names[name] = name
        if letter:
            names[letter] = name
    options, left = Options(), list(arguments)
    while left and left[0].startswith("-") and left[0] != "-":
        word = left.pop(0)
        if word == "--":
            break
        spelling, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if (found := names.get(spelling)) is None:
            raise CommandError(f"flag provided but not defined: {word.partition('=')[0]}", USAGE_CODE)
        if not equals:
            if kinds[found] == SWITCH:
                value = "true"
            elif not left:
                raise CommandError(f"flag needs an argument: {word}", USAGE_CODE)
            else:
                value = left.pop(0)
        elif kinds[found] == SWITCH and value not in ("true", "false"):
            raise CommandError(f"{word}: true or false is wanted", USAGE_CODE)
        options.put(found, value)
    return options, left
