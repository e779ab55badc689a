"""`corral system check`."""

import json
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, pass_app, readable
from corral.cli.output import plain

if TYPE_CHECKING:
    from corral.api.types.v1 import types_pb2


@click.command("check")
@click.option("--repair", is_flag=True, help="Put right what is found")
@click.option("--deep", is_flag=True, help="Hash what is stored of every layer too: as long as it takes to read it")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="Output form")
@pass_app
def check_command(app: App, repair: bool, deep: bool, form: str) -> int:
    """Compare what every service has written down with what is there, and with what the others know.

    One line for each thing that does not fit, with what --repair does about it; exit code 1 if any is left. That is
    how to get images and containers back after the database of images was lost or damaged: --repair makes it anew from
    blobs and trees.
    """
    findings = app.client.system.check(repair=repair, deep=deep)
    for finding in findings:
        click.echo(json.dumps(plain(finding), ensure_ascii=False) if form == "json" else readable(_line(finding)))
    return int(any(not finding.repaired for finding in findings))


def _line(finding: "types_pb2.Finding") -> str:
    line = f"{finding.service}: {finding.subject} {finding.problem}; {finding.remedy}"
    if finding.repaired:
        return f"{line}: done"
    return f"{line}: {finding.failure}" if finding.failure else line
