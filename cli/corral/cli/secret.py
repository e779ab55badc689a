"""`corral secret`."""

import os
import sys
from pathlib import Path

import click

from corral.cli.app import App, each, pass_app
from corral.cli.output import format_option, human_age, show_json, show_rows


@click.group("secret")
def secret_command() -> None:
    """Secrets: what containers get as files in memory (run --secret)."""


@secret_command.command("create")
@click.option("-l", "--label", "labels", multiple=True, help="KEY=VALUE")
@click.option("--env", "from_env", is_flag=True, help="FILE is the name of an environment variable instead")
@click.argument("name")
@click.argument("file", metavar="FILE|-")
@pass_app
def create_command(app: App, name: str, file: str, labels: tuple[str, ...], from_env: bool) -> None:
    """Create a secret of a file's content, or of standard input's."""
    pairs = {key: value for key, _, value in (text.partition("=") for text in labels)}
    click.echo(app.client.secrets.create(name, _content(file, from_env=from_env), labels=pairs).id)


def _content(file: str, *, from_env: bool) -> bytes:
    if from_env:
        if file not in os.environ:
            raise ValueError(f"there is no environment variable {file!r}")
        return os.fsencode(os.environ[file])
    return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()


@secret_command.command("ls")
@format_option
@pass_app
def ls_command(app: App, form: str, quiet: bool) -> None:
    """List secrets."""
    found = app.client.secrets.list()
    rows = [(s.id[:12], s.name, f"{human_age(s.created_at)} ago", str(len(s.containers))) for s in found]
    show_rows(("ID", "NAME", "CREATED", "CONTAINERS"), rows, found, form, [s.name for s in found] if quiet else None)


@secret_command.command("inspect")
@click.argument("names", nargs=-1, required=True)
@pass_app
def inspect_command(app: App, names: tuple[str, ...]) -> None:
    """Show all facts about secrets, but for their content, as JSON."""
    show_json([app.client.secrets.get(name) for name in names])


@secret_command.command("rm")
@click.argument("names", nargs=-1, required=True)
@pass_app
def rm_command(app: App, names: tuple[str, ...]) -> int:
    """Remove secrets that no container uses."""
    return each(names, app.client.secrets.remove)
