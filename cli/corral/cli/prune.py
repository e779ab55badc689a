"""`corral container prune`, `network prune` and `system prune`: what nobody uses, as docker has it.

What has come into use between the look and the removal stays: nothing is forced.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, pass_app
from corral.cli.image_filters import PruneFilters, parse_prune_filters
from corral.cli.output import human_size

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_FORCE = click.option("-f", "--force", is_flag=True, expose_value=False, help="As docker's; nothing is asked anyway")
_FILTER = click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only what was made before until=TIME, or that long ago; with or without label[!]=KEY[=VALUE]",
)


@click.command("prune")
@_FORCE
@_FILTER
@pass_app
def container_prune_command(app: App, filters: Sequence[str]) -> None:
    """Remove all containers that do not run."""
    removed, freed = _prune_containers(app, parse_prune_filters(filters))
    _tell("Deleted Containers", removed)
    click.echo(f"Total reclaimed space: {human_size(freed)}")


@click.command("prune")
@_FORCE
@_FILTER
@pass_app
def network_prune_command(app: App, filters: Sequence[str]) -> None:
    """Remove all networks that no container is in."""
    _tell("Deleted Networks", _prune_networks(app, parse_prune_filters(filters)))


@click.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Also named images that no container uses")
@click.option("--volumes", is_flag=True, help="Also anonymous volumes that no container uses")
@_FORCE
@_FILTER
@pass_app
def system_prune_command(app: App, everything: bool, volumes: bool, filters: Sequence[str]) -> None:
    """Remove containers that do not run, networks that nobody is in, and images without a name that nobody uses."""
    only = parse_prune_filters(filters)
    if volumes and filters:
        raise ValueError("--volumes and --filter exclude one another: volumes are not filtered")
    removed, freed = _prune_containers(app, only)
    _tell("Deleted Containers", removed)
    _tell("Deleted Networks", _prune_networks(app, only))
    if volumes:
        _tell("Deleted Volumes", app.client.volumes.prune())
    images = app.client.images.prune(
        all=everything, until=only.until, labels=only.labels, without_labels=only.without_labels
    )
    _tell("Deleted Images", [*images.untagged, *images.deleted])
    click.echo(f"Total reclaimed space: {human_size(freed + images.reclaimed_bytes)}")


def _prune_containers(app: App, only: PruneFilters) -> tuple[list[str], int]:
    """Ids of those removed, and how many bytes they had written."""
    from corral.api.engine.v1 import engine_pb2

    ended = (engine_pb2.STATUS_CREATED, engine_pb2.STATUS_EXITED)
    found = app.client.containers.list(all=True, size=True)
    wanted = [c for c in found if c.status in ended and _is_meant(only, c.created_at, c.config.labels)]
    removed = _removed((c.id for c in wanted), app.client.containers.remove)
    return removed, sum(c.size_rw_bytes for c in wanted if c.id in removed)


def _prune_networks(app: App, only: PruneFilters) -> list[str]:
    idle = (n for n in app.client.networks.list() if not n.builtin and not n.endpoints)
    return _removed((n.name for n in idle if _is_meant(only, n.created_at, n.labels)), app.client.networks.remove)


def _removed(names: Iterable[str], remove: Callable[[str], object]) -> list[str]:
    from corral.rpc import errors

    done = []
    for name in names:
        try:
            remove(name)
        except (errors.FailedPrecondition, errors.NotFound):  # it is used again, or was removed by somebody else
            continue
        done.append(name)
    return done


def _is_meant(only: PruneFilters, made_at: "Timestamp", labels: Mapping[str, str]) -> bool:
    if only.until is not None and made_at.ToNanoseconds() >= only.until.ToNanoseconds():
        return False
    return all(_has(labels, each) for each in only.labels) and not any(_has(labels, e) for e in only.without_labels)


def _has(labels: Mapping[str, str], wanted: str) -> bool:
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)


def _tell(title: str, names: Sequence[str]) -> None:
    if names:
        click.echo(f"{title}:")
        for name in names:
            click.echo(name)
        click.echo()
