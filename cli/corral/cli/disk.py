"""`corral system df`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, pass_app
from corral.cli.output import enum_word, human_age, human_size, plain, show_rows

if TYPE_CHECKING:
    from corral.api.engine.v1 import engine_pb2
    from corral.api.images.v1 import images_pb2

_SHORT_ID = 12


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of thing."""

    type: str
    total: int
    active: int
    size_bytes: int
    reclaimable_bytes: int


@click.command("df")
@click.option("-v", "--verbose", is_flag=True, help="Each image, container and volume")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", help="Output form")
@pass_app
def df_command(app: App, verbose: bool, form: str) -> None:
    """Show what is on disk, and what of it could go.

    Images are made of blobs, as they came, and of snapshots, into which these were unpacked; so what images take is a
    part of what these two take, of all namespaces. Reclaimable is: of images, what `corral image prune -a` frees by
    removing those that no container uses; of blobs, snapshots and partial downloads, what `corral image prune` frees;
    of containers, what those hold that do not run; of volumes, what those hold that no container uses.
    """
    usage = app.client.system.disk_usage()
    if verbose and form == "json":
        click.echo(json.dumps(plain(usage), indent=2, ensure_ascii=False))
    elif verbose:
        _show_everything(usage)
    elif form == "json":
        for row in rows(usage):
            click.echo(json.dumps(asdict(row)))
    else:
        cells = [
            (row.type, str(row.total), str(row.active), human_size(row.size_bytes), _reclaimable(row))
            for row in rows(usage)
        ]
        show_rows(("TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"), cells, [], "table", None)


def rows(usage: "engine_pb2.DiskUsageResponse") -> list[Row]:
    """The summary."""
    images, containers, volumes = usage.images, usage.containers, usage.volumes
    alive = [c for c in containers if _is_alive(c)]
    used = [v for v in volumes if v.containers]
    written = sum(c.size_bytes for c in containers)
    held = sum(v.size_bytes for v in volumes)
    return [
        Row(
            "Images",
            len(images.images),
            sum(bool(image.snapshots) for image in images.images),
            images.images_size_bytes,
            images.images_reclaimable_bytes,
        ),
        Row("Containers", len(containers), len(alive), written, written - sum(c.size_bytes for c in alive)),
        Row("Local Volumes", len(volumes), len(used), held, held - sum(v.size_bytes for v in used)),
        _store("Blobs", images.blobs),
        _snapshots(usage),
        _store("Partial downloads", images.partials),
    ]


def _is_alive(container: "engine_pb2.ContainerUsage") -> bool:
    from corral.api.engine.v1 import engine_pb2

    return container.status in (engine_pb2.STATUS_RUNNING, engine_pb2.STATUS_PAUSED)


def _store(name: str, usage: "images_pb2.StoreUsage") -> Row:
    return Row(name, usage.total, usage.active, usage.size_bytes, usage.reclaimable_bytes)


def _snapshots(usage: "engine_pb2.DiskUsageResponse") -> Row:
    """Layers, and the namespace's own trees but those of containers."""
    of_containers = {container.id for container in usage.containers}
    others = [tree for tree in usage.images.snapshots if tree.key not in of_containers]
    layers = usage.images.layers
    return Row(
        "Snapshots",
        layers.total + len(others),
        layers.active + len(others),
        layers.size_bytes + sum(tree.size_bytes for tree in others),
        layers.reclaimable_bytes,
    )


def _reclaimable(row: Row) -> str:
    share = f" ({100 * row.reclaimable_bytes // row.size_bytes}%)" if row.size_bytes else ""
    return f"{human_size(row.reclaimable_bytes)}{share}"


def _show_everything(usage: "engine_pb2.DiskUsageResponse") -> None:
    _section(
        "Images",
        ("REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE", "SHARED SIZE", "UNIQUE SIZE", "CONTAINERS"),
        [row for image in usage.images.images for row in _image_rows(image)],
    )
    _section(
        "Containers",
        ("CONTAINER ID", "IMAGE", "COMMAND", "LOCAL VOLUMES", "SIZE", "CREATED", "STATUS", "NAMES"),
        [_container_row(container) for container in usage.containers],
    )
    _section(
        "Local Volumes",
        ("VOLUME NAME", "LINKS", "SIZE"),
        [(volume.name, str(volume.containers), human_size(volume.size_bytes)) for volume in usage.volumes],
    )
    for row in rows(usage)[3:]:
        click.echo(f"{row.type}: {row.total}, {human_size(row.size_bytes)}, {_reclaimable(row)} of it reclaimable")


def _section(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    click.echo(f"{title}:\n")
    show_rows(headings, cells, [], "table", None)
    click.echo()


def _image_rows(image: "images_pb2.ImageUsage") -> Iterator[tuple[str, ...]]:
    from corral.cli.image import split_name

    created = f"{human_age(image.created_at)} ago" if image.HasField("created_at") else ""
    for name in image.names or ("",):
        yield (
            *split_name(name),
            image.id.rpartition(":")[2][:_SHORT_ID],
            created,
            human_size(image.size_bytes),
            human_size(image.shared_bytes),
            human_size(image.size_bytes - image.shared_bytes),
            str(len(image.snapshots)),
        )


def _container_row(container: "engine_pb2.ContainerUsage") -> tuple[str, ...]:
    from corral.api.engine.v1 import engine_pb2

    command = container.command
    return (
        container.id[:_SHORT_ID],
        container.image,
        command if len(command) <= 30 else f"{command[:29]}…",
        str(len(container.volumes)),
        human_size(container.size_bytes),
        f"{human_age(container.created_at)} ago",
        enum_word(engine_pb2.Status.Name(container.status), "Status"),
        container.name,
    )
