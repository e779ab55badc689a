"""`corral update`: what of a container can be changed while it runs."""

from typing import Any

import click

from corral.cli.app import App, ContainerName, each, pass_app
from corral.cli.flags import SwitchCommand
from corral.cli.run import CHANGEABLE, MAY_BE_ZERO


@click.command("update", cls=SwitchCommand)
@click.argument("containers", nargs=-1, required=True, type=ContainerName())
@pass_app
def update_command(app: App, containers: tuple[str, ...], **flags: Any) -> int:
    """Change limits, rates, restart policy and labels of containers, running or not."""
    changes = {name: value for name, value in flags.items() if value or (name in MAY_BE_ZERO and value is not None)}
    if not changes:
        raise click.UsageError("nothing is to be changed: give a limit, --net-rate, --restart or --label")
    for key in {"labels", "cgroup_conf"} & changes.keys():
        changes[key] = dict(text.partition("=")[::2] for text in changes[key])
    return each(containers, lambda container: app.client.containers.update(container, **changes))


for _flags, _text, _more in CHANGEABLE:
    update_command = click.option(*_flags, help=_text, **_more)(update_command)
