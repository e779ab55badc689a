"""How far a transfer is: bars on a terminal, a line per layer elsewhere."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from corral.cli.output import human_size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from corral.api.images.v1 import images_pb2
    from corral.api.types.v1 import types_pb2

_SHORT = 12


def shown[P: (images_pb2.ImportResponse, images_pb2.PullResponse, images_pb2.PushResponse)](
    parts: Iterator[P], *, quiet: bool, lines: bool = True
) -> Iterator[P]:
    """The same messages, shown on stderr as they pass. lines: also where that is no terminal."""
    if quiet or not (lines or sys.stderr.isatty()):
        return parts
    return _bars(parts) if sys.stderr.isatty() else _lines(parts)


def _name(progress: "types_pb2.Progress") -> str:
    return progress.item.rpartition(":")[2][:_SHORT]


def _step(progress: "types_pb2.Progress") -> str:
    from corral.api.types.v1 import types_pb2

    return types_pb2.Progress.Step.Name(progress.step).removeprefix("STEP_").lower()


def _bars[P: (images_pb2.ImportResponse, images_pb2.PullResponse, images_pb2.PushResponse)](
    parts: Iterator[P],
) -> Iterator[P]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    words = TextColumn("{task.description}"), TextColumn("{task.fields[step]}")
    with Progress(
        words[0], BarColumn(), DownloadColumn(), TransferSpeedColumn(), words[1],
        console=Console(stderr=True), transient=True,
    ) as bars:  # fmt: skip
        tasks: dict[str, TaskID] = {}
        for part in parts:
            if part.HasField("progress"):
                progress = part.progress
                name = _name(progress)
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=None, step="")
                total = progress.total_bytes or None
                bars.update(tasks[name], completed=progress.done_bytes, total=total, step=_step(progress))
            yield part


_WORDS = {"exists": "already here", "verify": "fetched", "done": "done"}


def _lines[P: (images_pb2.ImportResponse, images_pb2.PullResponse, images_pb2.PushResponse)](
    parts: Iterator[P],
) -> Iterator[P]:
    """What is over, once for each layer and step."""
    said: set[tuple[str, str]] = set()
    for part in parts:
        if part.HasField("progress"):
            name, step = _name(part.progress), _step(part.progress)
            if step in _WORDS and (name, step) not in said:
                said.add((name, step))
                size = f" ({human_size(part.progress.total_bytes)})" if part.progress.total_bytes else ""
                click.echo(f"{name}: {_WORDS[step]}{size}", err=True)
        yield part
