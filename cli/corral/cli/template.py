"""Output by a template, as people write it for docker: {{.Repository}}:{{.Tag}}, {{json .}}, table {{.ID}}\\t{{.Size}}.

A name is a column's, without its spaces (IMAGE ID is .ImageID, or .ID), else a member of the JSON form, with or without
its underscores, a member of a member behind another dot. {{index .Labels "key"}} and {{index .Names 0}} are one of
many. Nothing else of Go's language is understood.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from corral.cli.output import Json

_PATH = r"\.(?:[A-Za-z_][A-Za-z0-9_]*)?(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
_PLACE = (
    rf"\{{\{{\s*(?:(?P<json>json\s+)?(?P<path>{_PATH})|index\s+(?P<many>{_PATH})\s+"
    r'(?:"(?P<key>[^"]*)"|(?P<number>[0-9]+)))\s*\}\}'
)
_TABLE = r"table\s+"
_ESCAPES = {r"\t": "\t", r"\n": "\n"}
NO_VALUE = "<no value>"


class OutputForm(click.ParamType[str, str]):
    """table, or what is the plain form of a command, json, or a template."""

    name = "form"

    def __init__(self, plain: str = "table") -> None:
        self._plain = plain

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Fails for what would be printed as it stands."""
        if value not in (self._plain, "json") and "{{" not in value:
            self.fail(f"{value!r} is none of {self._plain}, json, and a template such as '{{{{.ID}}}}'", param, ctx)
        return value


def is_table(template: str) -> bool:
    return re.match(_TABLE, template) is not None


def columns(template: str) -> list[str]:
    """The cells of a template that begins with table."""
    return _unescaped(re.sub(_TABLE, "", template, count=1)).split("\t")


def headings(template: str) -> list[str]:
    """A heading for each of its cells."""
    return [re.sub(_PLACE, _heading, cell) for cell in columns(template)]


def _heading(match: re.Match[str]) -> str:
    name = match["key"] or (match["path"] or match["many"])[1:]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).upper()


def render(template: str, document: "Json", row: Mapping[str, str] | None = None) -> str:
    """The text for one thing. Raises ValueError for what is not understood."""

    def fill(match: re.Match[str]) -> str:
        value = _look_up((match["path"] or match["many"])[1:], document, row or {})
        if match["many"]:
            value = _member(value, match["key"], match["number"])
        if match["json"]:
            return json.dumps(value, ensure_ascii=False)
        if value is None:
            return NO_VALUE
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    text = _unescaped(template)
    left = re.sub(_PLACE, "", text)
    if "{{" in left or "}}" in left:
        raise ValueError(f"the template {template!r} is not understood: {{{{.Name}}}} and {{{{json .Name}}}} are")
    return re.sub(_PLACE, fill, text)


def row_of(names: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """Cells of a table by the names that a template may give them."""
    found: dict[str, str] = {}
    for name, cell in zip(names, cells, strict=True):
        found[_plain(name)] = cell
        found.setdefault(_plain(name.split()[-1]), cell)
    return found


def _unescaped(template: str) -> str:
    return re.sub(r"\\[tn]", lambda match: _ESCAPES[match[0]], template)


def _look_up(path: str, document: "Json", row: Mapping[str, str]) -> "Json":
    if not path:
        return document
    if (cell := row.get(_plain(path))) is not None:
        return cell
    value = document
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = next((item for key, item in value.items() if _plain(key) == _plain(name)), None)
    return value


def _member(value: "Json", key: str | None, number: str | None) -> "Json":
    """One of many. A key that is not there is empty, as with Go's maps. Raises ValueError for a number past the end."""
    if key is not None:
        return value.get(key, "") if isinstance(value, dict) else None
    at = int(number or 0)
    if isinstance(value, list) and at >= len(value):
        raise ValueError(f"the template asks for number {at} of {len(value)}, counted from 0")
    return value[at] if isinstance(value, list) else None


def _plain(name: str) -> str:
    return name.replace(" ", "").replace("_", "").lower()
