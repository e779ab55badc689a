"""`corral image mount` and `unmount`."""

import os
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, ImageName, each, pass_app
from corral.cli.output import human_age, show_rows

if TYPE_CHECKING:
    from corral.api.images.v1 import images_pb2

_DIRECTORY = "corral.mount"


@click.command("mount")
@click.option("--rw", "writable", is_flag=True, help="Writable; what is written goes when it is unmounted")
@click.argument("image", required=False, type=ImageName())
@click.argument("directory", required=False, type=click.Path())
@pass_app
def mount_command(app: App, image: str | None, directory: str | None, writable: bool) -> None:
    """Mount IMAGE on DIRECTORY of the daemon's host, read-only; without arguments, list what is mounted so."""
    if image is None:
        _list(app)
    elif directory is None:
        raise click.UsageError("Missing argument 'DIRECTORY'.")
    else:
        app.client.snapshots.mount(image, os.path.abspath(directory), writable=writable)  # noqa: PTH100 - keeps links


@click.command("unmount")
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY...")
@pass_app
def unmount_command(app: App, directories: tuple[str, ...]) -> int:
    """Unmount what `corral image mount` has mounted; what was written to it is removed."""
    return each(tuple(os.path.abspath(path) for path in directories), app.client.snapshots.unmount)  # noqa: PTH100


def _list(app: App) -> None:
    found = [one for one in app.client.snapshots.list() if _DIRECTORY in one.labels]
    rows = [(one.labels[_DIRECTORY], _access(one), one.driver, f"{human_age(one.created_at)} ago") for one in found]
    show_rows(("DIRECTORY", "ACCESS", "DRIVER", "CREATED"), rows, found, "table", None)


def _access(snapshot: "images_pb2.Snapshot") -> str:
    from corral.api.images.v1 import images_pb2

    return "rw" if snapshot.kind == images_pb2.Snapshot.KIND_ACTIVE else "ro"
