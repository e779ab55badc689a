"""What a server asks for when it answers 401.

    WWW-Authenticate: Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull"

Source: RFC 9110 section 11.6.1 and the grammar of its section 11.2 to 11.4; docker token authentication.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TOKEN68 = re.compile(r"[A-Za-z0-9\-._~+/]+=*(?=[ \t]*(?:,|$))")
_VALUE = re.compile(r'[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([!#$%&\'*+\-.^_`|~0-9A-Za-z]+))')
_BETWEEN = re.compile(r"[ \t,]*")
_SPACE = re.compile(r"[ \t]*")
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate. Scheme and names of parameters in lower case, as they may be written in any."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """All challenges of the WWW-Authenticate headers; what follows something malformed is left out."""
    return [challenge for header in headers for challenge in _parse(header)]


def _parse(text: str) -> Iterator[Challenge]:
    scheme, parameters = "", dict[str, str]()
    position = _skip(_BETWEEN, text, 0)
    while (word := _TOKEN.match(text, position)) is not None:
        value = _VALUE.match(text, word.end())
        if value is not None and scheme:
            parameters[word[0].lower()] = _ESCAPED.sub(r"\1", value[1]) if value[1] is not None else value[2]
            position = value.end()
        else:
            if scheme:
                yield Challenge(scheme, parameters)
            scheme, parameters = word[0].lower(), {}
            position = _skip(_SPACE, text, word.end())
            if position > word.end() and (token68 := _TOKEN68.match(text, position)) is not None:
                position = token68.end()
        position = _skip(_BETWEEN, text, position)
    if scheme:
        yield Challenge(scheme, parameters)


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position
