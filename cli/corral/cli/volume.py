"""`corral volume`."""

import click

from corral.cli.app import App, each, pass_app
from corral.cli.output import format_option, show_json, show_rows


@click.group("volume")
def volume_command() -> None:
    """Volumes."""


@volume_command.command("create")
@click.option("--label", "labels", multiple=True, help="KEY=VALUE")
@click.option("-o", "--opt", "options", multiple=True, help="size=10g; or type, device and o of mount(8)")
@click.argument("name", default="")
@pass_app
def create_command(app: App, name: str, labels: tuple[str, ...], options: tuple[str, ...]) -> None:
    """Create a volume. One that is there already is no error, unless labels or options are asked for."""
    from corral.rpc import errors

    try:
        click.echo(app.client.volumes.create(name, labels=_pairs(labels), options=_pairs(options)).name)
    except errors.AlreadyExists:
        if labels or options:
            raise
        click.echo(name)


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


@volume_command.command("ls")
@format_option
@pass_app
def ls_command(app: App, form: str, quiet: bool) -> None:
    """List volumes."""
    volumes = app.client.volumes.list()
    rows = [(v.driver, v.name) for v in volumes]
    show_rows(("DRIVER", "VOLUME NAME"), rows, volumes, form, [v.name for v in volumes] if quiet else None)


@volume_command.command("inspect")
@click.argument("names", nargs=-1, required=True)
@pass_app
def inspect_command(app: App, names: tuple[str, ...]) -> None:
    """Show all facts about volumes, as JSON."""
    show_json([app.client.volumes.get(name) for name in names])


@volume_command.command("rm")
@click.option("-f", "--force", is_flag=True, help="What is not there is no error")
@click.argument("names", nargs=-1, required=True)
@pass_app
def rm_command(app: App, names: tuple[str, ...], force: bool) -> int:
    """Remove volumes that no container uses."""
    return each(names, app.client.volumes.remove, may_be_gone=force)


@volume_command.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Named ones too")
@click.option("-f", "--force", is_flag=True, expose_value=False, help="As docker's; nothing is asked anyway")
@pass_app
def prune_command(app: App, everything: bool) -> None:
    """Remove volumes that no container uses."""
    for name in app.client.volumes.prune(all=everything):
        click.echo(name)
