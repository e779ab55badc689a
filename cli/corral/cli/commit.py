"""`corral commit`, `diff` and `export`: what a container has written."""

import click

from corral.cli.app import App, ContainerName, pass_app, readable
from corral.cli.archive import output_option, write_out

_LETTERS = {1: "A", 2: "C", 3: "D"}


@click.command("commit")
@click.option("-m", "--message", default="", help="What the image's history shall tell")
@click.option("-a", "--author", default="", help="Who made it, such as 'Ann <ann@example.org>'")
@click.option("-c", "--change", "changes", multiple=True, metavar="LINE", help="A Dockerfile's line, such as 'CMD top'")
@click.option("-p", "--pause/--no-pause", default=True, help="Pause the container meanwhile; the default")
@click.argument("container", type=ContainerName())
@click.argument("name", default="")
@pass_app
def commit_command(
    app: App, container: str, name: str, message: str, author: str, changes: tuple[str, ...], pause: bool
) -> None:
    """Make an image, called NAME[:TAG] or nothing, of what a container has written."""
    image = app.client.containers.commit(container, name, author=author, comment=message, changes=changes, pause=pause)
    click.echo(image.id)


@click.command("diff")
@click.argument("container", type=ContainerName())
@pass_app
def diff_command(app: App, container: str) -> None:
    """Show what a container has added (A) to its image's files, changed (C) in them, and deleted (D)."""
    for change in app.client.containers.changes(container):
        click.echo(f"{_LETTERS[change.kind]} {readable(change.path)}")


@click.command("export")
@output_option
@click.argument("container", type=ContainerName())
@pass_app
def export_command(app: App, container: str, output: str) -> None:
    """Write a container's whole root file system, its image's and its own files, as a plain tar."""
    write_out(app.client.containers.export(container), output)
