"""How a process ended, as a shell sees it."""

import signal
from typing import TYPE_CHECKING

import click

from corral.cli.app import complain

if TYPE_CHECKING:
    from corral.api.types.v1 import types_pb2


def exit_code(status: "types_pb2.ExitStatus", what: str = "the container") -> int:
    """The code a shell sees; says why where the number alone does not tell."""
    if status.oom_killed:
        whom = what if status.signal == signal.SIGKILL else f"a process of {what}"
        click.echo(f"corral: {whom} was killed: out of memory (OOM)", err=True)
    elif status.timed_out:
        click.echo("corral: the container was killed: its time (--timeout) was over", err=True)
    elif not status.known:
        complain(status.reason or "how the container ended is not known")
    return status.code
