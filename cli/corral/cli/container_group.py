"""`corral container`: the verbs of containers by their noun."""

import click

from corral.cli.main import VERBS, load_verb
from corral.cli.prune import container_prune_command

_OWN = {"ls": "ps", "list": "ps"}
_VERBS = tuple(list(VERBS)[: list(VERBS).index("events")])
"""Those that the help has before the first one that is about more than containers."""


class _Containers(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_VERBS, "ls", "prune"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "prune":
            return container_prune_command
        verb = _OWN.get(cmd_name, cmd_name)
        return load_verb(verb) if verb in _VERBS else None


@click.command("container", cls=_Containers)
def container_command() -> None:
    """Containers."""
