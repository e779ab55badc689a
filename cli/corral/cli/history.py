"""`corral image history`: how an image came to be."""

from typing import TYPE_CHECKING

import click

from corral.cli.app import App, ImageName, pass_app
from corral.cli.output import format_option, human_age, human_size, show_rows

if TYPE_CHECKING:
    from corral.api.images.v1 import images_pb2

_NO_STEP = "<not told>"
_WIDTH = 45


@click.command("history")
@click.option("--no-trunc", is_flag=True, help="Whole commands and ids")
@format_option
@click.argument("name", type=ImageName())
@pass_app
def history_command(app: App, name: str, no_trunc: bool, form: str, quiet: bool) -> None:
    """Show the steps that an image was made in, the last one first, and what each has added."""
    steps = steps_of(app.client.images.get(name))
    ids = [layer.diff_id if layer else "<none>" for _, layer in steps]
    shown = ids if no_trunc else [each.rpartition(":")[2][:12] for each in ids]
    rows = [_row(entry, layer, each, no_trunc) for (entry, layer), each in zip(steps, shown, strict=True)]
    headings: tuple[str, ...] = ("LAYER", "CREATED", "CREATED BY", "SIZE", "COMMENT")
    if form not in ("table", "json"):  # what templates that were written for docker call them
        headings, rows = (*headings, "ID", "CREATED SINCE"), [(*row, row[0], row[1]) for row in rows]
    show_rows(headings, rows, [entry for entry, _ in steps], form, shown if quiet else None)


def steps_of(image: "images_pb2.Image") -> "list[tuple[images_pb2.History, images_pb2.Layer | None]]":
    """The history, the last step first, each with the layer that it has made; layers that no step tells of come last
    as if made by one."""
    from corral.api.images.v1 import images_pb2

    layers = list(image.layers)
    told = sum(not entry.empty_layer for entry in image.history)
    untold = [images_pb2.History(created_by=_NO_STEP)] * max(len(layers) - told, 0)
    entries = (*untold, *image.history)
    steps = [(entry, None if entry.empty_layer or not layers else layers.pop(0)) for entry in entries]
    return steps[::-1]


def _row(entry: "images_pb2.History", layer: "images_pb2.Layer | None", shown: str, no_trunc: bool) -> tuple[str, ...]:
    command = entry.created_by
    return (
        shown,
        f"{human_age(entry.created_at)} ago" if entry.HasField("created_at") else "",
        command if no_trunc or len(command) <= _WIDTH else f"{command[: _WIDTH - 1]}…",
        human_size(layer.size_bytes if layer else 0),
        entry.comment,
    )
