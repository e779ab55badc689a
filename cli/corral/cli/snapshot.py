"""`corral snapshot`."""

from typing import TYPE_CHECKING

import click

from corral.cli.app import App, each, pass_app
from corral.cli.output import enum_word, format_option, human_age, human_size, show_json, show_rows

if TYPE_CHECKING:
    from corral.api.images.v1 import images_pb2

_keys = click.argument("keys", nargs=-1, required=True)
_SHORT = 12


@click.group("snapshot")
def snapshot_command() -> None:
    """Snapshots: the trees of containers, and the layers below them."""


@snapshot_command.command("ls")
@click.option("--no-trunc", is_flag=True, help="Whole keys")
@format_option
@pass_app
def ls_command(app: App, no_trunc: bool, form: str, quiet: bool) -> None:
    """List snapshots: the namespace's own, and the layers of images."""
    snapshots = app.client.snapshots.list()
    show_rows(
        ("KEY", "PARENT", "KIND", "DRIVER", "CREATED", "SIZE", "QUOTA"),
        [_row(snapshot, no_trunc) for snapshot in snapshots],
        snapshots,
        form,
        [snapshot.key for snapshot in snapshots] if quiet else None,
    )


def _row(snapshot: "images_pb2.Snapshot", no_trunc: bool) -> tuple[str, ...]:
    from corral.api.images.v1 import images_pb2

    committed = snapshot.kind == images_pb2.Snapshot.KIND_COMMITTED
    return (
        _shown(snapshot.key, no_trunc),
        _shown(snapshot.parent, no_trunc),
        enum_word(images_pb2.Snapshot.Kind.Name(snapshot.kind), "Kind"),
        snapshot.driver,
        f"{human_age(snapshot.created_at)} ago",
        human_size(snapshot.size_bytes) if committed else "",
        human_size(snapshot.quota_bytes) if snapshot.quota_bytes else "",
    )


def _shown(key: str, no_trunc: bool) -> str:
    hexadecimal = key.removeprefix("sha256:")
    is_id = len(hexadecimal) == 64 and not set(hexadecimal) - set("0123456789abcdef")
    return hexadecimal[:_SHORT] if is_id and not no_trunc else key


@snapshot_command.command("inspect")
@_keys
@pass_app
def inspect_command(app: App, keys: tuple[str, ...]) -> None:
    """Show all facts about snapshots, as JSON."""
    show_json([app.client.snapshots.get(key) for key in keys])


@snapshot_command.command("mounts")
@click.argument("key")
@pass_app
def mounts_command(app: App, key: str) -> None:
    """Show how a container's tree is mounted, as JSON."""
    show_json(app.client.snapshots.mounts(key))


@snapshot_command.command("usage")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", help="Output form")
@_keys
@pass_app
def usage_command(app: App, keys: tuple[str, ...], form: str) -> None:
    """Show what snapshots take on disk, beyond what is below them."""
    usages = [app.client.snapshots.usage(key) for key in keys]
    rows = [(key, human_size(u.size_bytes), str(u.inodes)) for key, u in zip(keys, usages, strict=True)]
    show_rows(("KEY", "SIZE", "INODES"), rows, usages, form, None)


@snapshot_command.command("rm")
@_keys
@pass_app
def rm_command(app: App, keys: tuple[str, ...]) -> int:
    """Remove snapshots that nothing lies on. A container's goes with the container."""
    return each(keys, app.client.snapshots.remove)


@snapshot_command.command("drivers")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", help="Output form")
@pass_app
def drivers_command(app: App, form: str) -> None:
    """Show the ways to stack layers: which this host can run, and why not the others."""
    drivers = app.client.snapshots.drivers()
    rows = [(d.name, "yes" if d.usable else "no", "*" if d.is_default else "", d.reason) for d in drivers]
    show_rows(("DRIVER", "USABLE", "DEFAULT", "WHY NOT"), rows, drivers, form, None)
