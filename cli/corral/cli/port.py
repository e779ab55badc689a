"""`corral port`: which ports of the host lead to a container's; more of them, or less, while it runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, ContainerName, pass_app

if TYPE_CHECKING:
    from corral.api.engine.v1 import engine_pb2
    from corral.api.network.v1 import network_pb2

_name = click.argument("container", type=ContainerName())
_ports = click.argument("ports", nargs=-1, required=True, metavar="[IP:][HOST:]CONTAINER[/PROTOCOL]...")


class _Port(click.Group):
    """`add` and `rm` are verbs where something follows; else they are names of containers."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if len(args) > 1 and args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return "show", _show, args


@click.group("port", cls=_Port, subcommand_metavar="CONTAINER [PORT[/PROTOCOL]] | add|rm CONTAINER PORT...")
def port_command() -> None:
    """Show which ports of the host lead to a container's, publish more of them, or withdraw some."""


@click.command("show")
@_name
@click.argument("port", required=False, metavar="[PORT[/PROTOCOL]]")
@pass_app
def _show(app: App, container: str, port: str | None) -> None:
    found = app.client.containers.get(container)
    if port is None:
        for line in _lines(found):
            click.echo(line)
        return
    number, _, protocol = port.partition("/")
    where = [w for inside, w in _published(found) if inside == f"{number}/{protocol or 'tcp'}"]
    if not where:
        raise click.ClickException(f"container {container} does not publish port {number}/{protocol or 'tcp'}")
    click.echo(where[0])


@port_command.command("add")
@_name
@_ports
@pass_app
def _add(app: App, container: str, ports: Sequence[str]) -> None:
    """Publish more ports of a container: at once if it runs, else with its next start. Shows all that it publishes."""
    for line in _lines(app.client.containers.publish(container, ports)):
        click.echo(line)


@port_command.command("rm")
@_name
@_ports
@pass_app
def _rm(app: App, container: str, ports: Sequence[str]) -> None:
    """Withdraw ports of a container. Without HOST it is whichever port of the host leads there."""
    app.client.containers.unpublish(container, ports)


def _published(container: "engine_pb2.Container") -> Sequence[tuple[str, str]]:
    """Ports inside, each with where it is published."""
    found = sorted(container.endpoint.ports, key=lambda p: (p.container_port, p.protocol, p.host_port))
    return [(f"{p.container_port}/{p.protocol}", _where(p)) for p in found]


def _where(port: "network_pb2.PortMapping") -> str:
    last = f"-{port.host_port_last}" if port.host_port_last else ""
    number = f"{port.host_port}{last}" if port.host_port else "(chosen at its next start)"
    return f"{_bracketed(port.host_ip or '0.0.0.0')}:{number}"


def _lines(container: "engine_pb2.Container") -> Sequence[str]:
    return [f"{inside} -> {where}" for inside, where in _published(container)]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
