"""`corral completion`."""

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print a completion script: `corral completion bash > /etc/bash_completion.d/corral`."""
    from click.shell_completion import get_completion_class

    from corral.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "corral", "_CORRAL_COMPLETE").source())
