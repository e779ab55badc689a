"""How results look: tables, JSON, sizes and ages."""

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import click

from corral.cli import template
from corral.cli.app import readable

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

type Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_WITHOUT_POINT = 999.5
"""From here on three digits are 1000, which the format g writes as 1e+03."""


def format_option[F: Callable[..., object]](function: F) -> F:
    """--format table|json|TEMPLATE, and -q."""
    function = click.option("-q", "--quiet", is_flag=True, help="Only names or ids")(function)
    return click.option(
        "--format", "form", type=template.OutputForm(), default="table", show_default=True,
        metavar="table|json|TEMPLATE", help="Output form; a template as for docker: '{{.ID}}'",
    )(function)  # fmt: skip


def show_rows(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    messages: "Sequence[Message]",
    form: str,
    keys: Sequence[str] | None,
) -> None:
    """A list in the form asked for; `keys` are what -q prints, or None without it."""
    rows = [[readable(cell) for cell in row] for row in rows]
    if keys is not None:
        for key in keys:
            click.echo(key)
    elif form == "json":
        for message in messages:
            click.echo(json.dumps(plain(message), ensure_ascii=False))
    elif form != "table":
        _show_by_template(headings, rows, messages, form)
    elif sys.stdout.isatty():
        _rich_table(headings, rows)
    else:
        click.echo(_columns([headings, *rows]))


def _show_by_template(
    headings: Sequence[str], rows: Sequence[Sequence[str]], messages: "Sequence[Message]", form: str
) -> None:
    documents = [plain(message) for message in messages]
    named = [template.row_of(headings, row) for row in rows]
    if not template.is_table(form):
        for document, row in zip(documents, named, strict=True):
            click.echo(template.render(form, document, row))
        return
    cells = template.columns(form)
    lines = [[template.render(c, d, r) for c in cells] for d, r in zip(documents, named, strict=True)]
    click.echo(_columns([template.headings(form), *lines]))


def show_json[M: "Message"](
    messages: Sequence[M], form: str = "", *, more: Callable[[M], dict[str, Json]] | None = None
) -> None:
    """What `inspect` prints: one JSON list, or for each what a template says. more: what that may name besides."""
    documents = [plain(message) for message in messages]
    if form in ("", "json"):
        click.echo(json.dumps(documents, indent=2, ensure_ascii=False))
    else:
        for message, document in zip(messages, documents, strict=True):
            known = {**more(message), **document} if more and isinstance(document, dict) else document
            click.echo(template.render(form, known))


def plain(message: "Message") -> Json:
    """A message as JSON for people: snake_case names, real numbers, enums as lower-case words, times as RFC 3339.

    Fields that are unset and have presence are left out; lists and plain fields are always there.
    """
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.struct_pb2 import Struct
    from google.protobuf.timestamp_pb2 import Timestamp

    if isinstance(message, Timestamp | Duration):
        return message.ToJsonString()
    if isinstance(message, Struct):
        from google.protobuf.json_format import MessageToDict

        answer: Json = _whole_numbers(MessageToDict(message))
        return answer
    return {
        f.name: _field(message, cast("FieldDescriptor", f))
        for f in message.DESCRIPTOR.fields
        if not f.has_presence or message.HasField(f.name)
    }


def _field(message: "Message", field: "FieldDescriptor") -> Json:
    value = getattr(message, field.name)
    if not field.is_repeated:
        return _value(value, field)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        inner = kind.fields_by_name["value"]
        return {str(k): _value(value[k], inner) for k in sorted(value)}
    return [_value(v, field) for v in value]


def _value(value: object, field: "FieldDescriptor") -> Json:
    if field.message_type is not None:
        return plain(value)  # type: ignore[arg-type]
    if field.enum_type is not None:
        return enum_word(field.enum_type.values_by_number[value].name, field.enum_type.name)  # type: ignore[index]
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value  # type: ignore[return-value]


def enum_word(name: str, enum: str) -> str:
    """STATUS_RUNNING of enum Status -> running."""
    prefix = "".join(f"_{c}" if c.isupper() else c for c in enum).strip("_").upper()
    return name.removeprefix(f"{prefix}_").lower().replace("_", "-")


def _whole_numbers(value: Json) -> Json:
    # A Struct holds every number as a double; 137.0 is an exit code nobody expects.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {k: _whole_numbers(v) for k, v in value.items()}
    return [_whole_numbers(v) for v in value] if isinstance(value, list) else value


def human_size(size: float) -> str:
    """1234567 -> 1.23MB, as docker shows sizes."""
    return _scaled(size, _UNITS, 1000)


def human_memory(size: float) -> str:
    """67108864 -> 64MiB, as docker shows memory."""
    return _scaled(size, _BINARY_UNITS, 1024)


def _scaled(size: float, units: Sequence[str], step: int) -> str:
    for unit in units:
        if size < step or unit == units[-1]:
            break
        size /= step
    return f"{size:.3g}{unit}" if size < _WITHOUT_POINT else f"{size:.0f}{unit}"


def human_age(when: "Timestamp") -> str:
    """How long ago: "5 seconds", "2 hours"."""
    seconds = max(0, int((datetime.now(UTC) - when.ToDatetime(UTC)).total_seconds()))
    for unit, length in (
        ("year", 31_536_000),
        ("month", 2_592_000),
        ("week", 604_800),
        ("day", 86_400),
        ("hour", 3600),
        ("minute", 60),
    ):
        if seconds >= 2 * length or (seconds >= length and unit in ("hour", "minute")):
            count = seconds // length
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{seconds} second{'' if seconds == 1 else 's'}"


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("   ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _rich_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=heading in ("CONTAINER ID", "NAMES", "NAME", "IMAGE ID"), overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(highlight=False).print(table)
