"""`corral update`: what of a container can be changed while it runs."""

from typing import Any

import click

from corral.cli.app import App, ContainerName, each, pass_app

# Flags, help; the rest goes to click. The names are those of corral.client.options.
_OPTIONS: tuple[tuple[tuple[str, ...], str, dict[str, Any]], ...] = (
    (("-m", "--memory"), "Memory limit, such as 64m", {"default": ""}),
    (("--memory-swap",), "Memory plus swap; -1 for no limit", {"default": ""}),
    (("--memory-reservation",), "Soft memory limit", {"default": ""}),
    (("--cpus",), "CPUs, such as 1.5", {"type": float, "default": 0.0}),
    (("-c", "--cpu-shares"), "Relative weight, default 1024", {"type": int, "default": 0}),
    (("--cpuset-cpus",), "CPUs to run on, such as 0-2,4", {"default": ""}),
    (("--cpuset-mems",), "Memory nodes to use", {"default": ""}),
    (("--pids-limit",), "Most processes; -1 for no limit", {"type": int, "default": 0}),
    (("--restart",), "no, always, on-failure[:N] or unless-stopped", {"default": ""}),
    (("-l", "--label", "labels"), "Label, KEY=VALUE, laid over those there are", {"multiple": True}),
)


@click.command("update")
@click.argument("containers", nargs=-1, required=True, type=ContainerName())
@pass_app
def update_command(app: App, containers: tuple[str, ...], **flags: Any) -> int:
    """Change limits, restart policy and labels of containers, running or not."""
    changes = {name: value for name, value in flags.items() if value}
    if not changes:
        raise click.UsageError("nothing is to be changed: give a limit, --restart or --label")
    if "labels" in changes:
        changes["labels"] = dict(label.partition("=")[::2] for label in changes["labels"])
    return each(containers, lambda container: app.client.containers.update(container, **changes))


for _flags, _text, _more in reversed(_OPTIONS):
    update_command = click.option(*_flags, help=_text, **_more)(update_command)
