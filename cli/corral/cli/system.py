"""`corral system` and `corral version`."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, pass_app
from corral.cli.check import check_command
from corral.cli.disk import df_command
from corral.cli.output import enum_word, human_size, plain, show_rows
from corral.cli.prune import system_prune_command

if TYPE_CHECKING:
    from corral.api.cgroups.v1 import cgroups_pb2

_FORM = click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", help="Output form")


@click.group("system")
def system_command() -> None:
    """The engine."""


system_command.add_command(df_command)
system_command.add_command(check_command)
system_command.add_command(system_prune_command)


@system_command.command("info")
@_FORM
@pass_app
def info_command(app: App, form: str) -> None:
    """Show counts, directories and facts about the host."""
    info = app.client.system.info()
    values = plain(info)
    assert isinstance(values, dict)
    if form == "json":
        click.echo(json.dumps(values, indent=2))
        return
    values["memory"] = human_size(info.memory_bytes)
    del values["memory_bytes"]
    values["limits"] = ", ".join(_limits(info.limits)) or "none"
    for key, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        click.echo(f"{key.replace('_', ' ').capitalize()}: {text}")


def _limits(limits: "cgroups_pb2.EngineLimits") -> Iterator[str]:
    """What all containers together may use, and how much of it they do."""
    if limits.memory_bytes:
        yield f"{human_size(limits.memory_usage_bytes)} of {human_size(limits.memory_bytes)} memory"
    if limits.cpus:
        yield f"{limits.cpus:g} CPUs"
    if limits.pids:
        yield f"{limits.pids_current} of {limits.pids} processes"


@system_command.command("version")
@_FORM
@pass_app
def system_version_command(app: App, form: str) -> None:
    """Show the versions of client and daemon."""
    from importlib.metadata import version

    server = app.client.system.version()
    if form == "json":
        click.echo(json.dumps({"client": {"version": version("corral")}, "server": plain(server)}, indent=2))
        return
    click.echo(f"Client: corral {version('corral')}")
    click.echo(f"Server: corral {server.version} at {app.client.address}")
    click.echo(f"  Services: {', '.join(server.services)}")
    click.echo(f"  APIs: {', '.join(server.apis)}")
    click.echo(f"  Python {server.python_version}, Linux {server.kernel_release}")


@system_command.command("upgrade")
@pass_app
def upgrade_command(app: App) -> None:
    """Have the daemon execute itself anew, with the code and settings that are on disk now.

    Nobody's connection is refused meanwhile, and containers are not concerned. If what is on disk would not start, the
    daemon goes on as it is.
    """
    before, after = app.client.system.upgrade()
    click.echo(f"corrald {before.version} is now {after.version}")


version_command = click.Command(
    "version", params=system_version_command.params, callback=system_version_command.callback, help="Show versions."
)


@system_command.command("check-host")
@_FORM
@pass_app
def check_host_command(app: App, form: str) -> int:
    """Show what this host has and lacks for running containers, with the remedy."""
    from corral.api.engine.v1 import engine_pb2

    checks = app.client.system.check_host()
    words = [enum_word(engine_pb2.Check.Result.Name(c.result), "Result") for c in checks]
    rows = [(w, c.name, c.detail, c.remedy) for w, c in zip(words, checks, strict=True)]
    show_rows(("RESULT", "CHECK", "DETAIL", "REMEDY"), rows, checks, form, None)
    return int("missing" in words)
