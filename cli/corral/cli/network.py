"""`corral network`."""

from ipaddress import ip_address
from typing import TYPE_CHECKING, TextIO

import click

from corral.cli.app import App, ContainerName, each, pass_app
from corral.cli.output import enum_word, format_option, show_json, show_rows
from corral.cli.prune import network_prune_command

if TYPE_CHECKING:
    from corral.api.engine.v1 import engine_pb2


@click.group("network")
def network_command() -> None:
    """Networks."""


network_command.add_command(network_prune_command)


@network_command.command("create")
@click.option("-d", "--driver", default="bridge", show_default=True, help="bridge, macvlan, ipvlan or cni")
@click.option("--subnet", "subnets", multiple=True, help="Subnet, 10.1.0.0/24; one is chosen otherwise")
@click.option(
    "--gateway", "gateways", multiple=True, help="Gateway of each subnet, in order; default the first address"
)
@click.option("--ip-range", "ranges", multiple=True, help="Part of each subnet to give out, in order")
@click.option("--internal", is_flag=True, help="No way out")
@click.option("--mtu", type=int, default=0, help="MTU; default the host's")
@click.option("--ipv6", is_flag=True, help="IPv6 too; its subnet is chosen where none is named")
@click.option("--icc", type=bool, help="Whether its containers reach one another  [default: true]")
@click.option("-o", "--opt", "options", multiple=True, help="KEY=VALUE, as docker's drivers have them")
@click.option(
    "--cni-config", type=click.File("r"), help="Of -d cni: file with its configuration; default /etc/cni/net.d has it"
)
@click.option("--label", "labels", multiple=True, help="KEY=VALUE")
@click.argument("name")
@pass_app
def create_command(
    app: App,
    name: str,
    driver: str,
    subnets: tuple[str, ...],
    gateways: tuple[str, ...],
    ranges: tuple[str, ...],
    internal: bool,
    mtu: int,
    ipv6: bool,
    icc: bool | None,
    options: tuple[str, ...],
    cni_config: TextIO | None,
    labels: tuple[str, ...],
) -> None:
    """Create a network."""
    from corral.api.network.v1 import network_pb2

    if len(gateways) > len(subnets) or len(ranges) > len(subnets):
        raise ValueError("--gateway and --ip-range need a --subnet each")
    request = network_pb2.CreateNetworkRequest(name=name, driver=driver, internal=internal, mtu=mtu, ipv6=ipv6)
    if icc is not None:
        request.options["com.docker.network.bridge.enable_icc"] = str(icc).lower()
    if cni_config is not None:
        request.options["cni.config"] = cni_config.read()
    for option in options:
        key, _, value = option.partition("=")
        request.options[key] = value
    for number, cidr in enumerate(subnets):
        request.subnets.add(
            cidr=cidr,
            gateway=gateways[number] if number < len(gateways) else "",
            range=ranges[number] if number < len(ranges) else "",
        )
    for label in labels:
        key, _, value = label.partition("=")
        request.labels[key] = value
    click.echo(app.client.networks.create(request).name)


@network_command.command("ls")
@format_option
@pass_app
def ls_command(app: App, form: str, quiet: bool) -> None:
    """List networks."""
    networks = app.client.networks.list()
    rows = [(n.id[:12], n.name, n.driver, ", ".join(s.cidr for s in n.subnets), n.interface) for n in networks]
    headings = ("NETWORK ID", "NAME", "DRIVER", "SUBNETS", "INTERFACE")
    show_rows(headings, rows, networks, form, [n.name for n in networks] if quiet else None)


@network_command.command("inspect")
@click.argument("names", nargs=-1, required=True)
@pass_app
def inspect_command(app: App, names: tuple[str, ...]) -> None:
    """Show all facts about networks, as JSON."""
    show_json([app.client.networks.get(name) for name in names])


@network_command.command("connect")
@click.option("--ip", "ipv4_address", default="", help="Fixed IPv4 address in the network")
@click.option("--ip6", "ipv6_address", default="", help="Fixed IPv6 address in the network")
@click.option("--mac-address", default="", help="MAC address")
@click.option("--alias", "aliases", multiple=True, help="Further name in the network")
@click.option("--interface", default="", help="Name of the interface inside; default the next ethN")
@click.option("--net-rate", "rate", default="", help="Most bits per second there, 100m, or received and sent, 100m/20m")
@click.argument("network")
@click.argument("container")
@pass_app
def connect_command(
    app: App,
    network: str,
    container: str,
    ipv4_address: str,
    ipv6_address: str,
    mac_address: str,
    aliases: tuple[str, ...],
    interface: str,
    rate: str,
) -> None:
    """Put a container into one more network: at once if it runs, else with its next start."""
    app.client.networks.connect(
        network,
        container,
        ipv4_address=ipv4_address,
        ipv6_address=ipv6_address,
        mac_address=mac_address,
        aliases=aliases,
        interface=interface,
        rate=rate,
    )


@network_command.command("disconnect")
@click.argument("network")
@click.argument("container")
@pass_app
def disconnect_command(app: App, network: str, container: str) -> None:
    """Take a container out of a network."""
    app.client.networks.disconnect(network, container)


@network_command.command("explain")
@click.argument("container", type=ContainerName())
@click.argument("destination", required=False, metavar="[ADDRESS|CONTAINER]")
@pass_app
def explain_command(app: App, container: str, destination: str | None) -> int:
    """Tell why packets of a container reach an address or another container, by default the internet, or why not.

    Nothing is sent, nothing changed. Exits with 1 if they do not.
    """
    from corral.api.network.v1 import network_pb2

    of = app.client.containers.get(container)
    steps = app.client.networks.explain(of.id, _address_of(app, of, destination) if destination else "")
    rows = [(enum_word(network_pb2.ExplainedStep.Verdict.Name(s.verdict), "Verdict"), s.where, s.says) for s in steps]
    show_rows(("", "WHERE", "WHAT"), rows, list(steps), "table", None)
    return int(any(step.verdict == network_pb2.ExplainedStep.VERDICT_DROPS for step in steps))


def _address_of(app: App, caller: "engine_pb2.Container", destination: str) -> str:
    """An address, or that of a container: where both are in a network, the one there."""
    try:
        return str(ip_address(destination))
    except ValueError:
        pass
    interfaces = app.client.containers.get(destination).endpoint.interfaces
    shared = {interface.network for interface in caller.endpoint.interfaces}
    found = sorted(interfaces, key=lambda interface: interface.network not in shared)
    if not found:
        raise ValueError(f"container {destination} has no address")
    return (found[0].ipv4_address or found[0].ipv6_address).partition("/")[0]


@network_command.command("rm")
@click.option("-f", "--force", is_flag=True, help="What is not there is no error")
@click.argument("names", nargs=-1, required=True)
@pass_app
def rm_command(app: App, names: tuple[str, ...], force: bool) -> int:
    """Remove networks that no container uses."""
    return each(names, app.client.networks.remove, may_be_gone=force)
