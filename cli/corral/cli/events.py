"""`corral events`."""

import json
import sys
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, pass_app
from corral.cli.output import plain

if TYPE_CHECKING:
    from corral.api.types.v1 import types_pb2


@click.command("events")
@click.option("--after", type=int, default=0, help="Only after this sequence number")
@click.option("--since", help="Only from this time: RFC 3339, or how long ago, such as 10m")
@click.option("--until", help="Only up to this time, then end")
@click.option("-f", "--filter", "filters", multiple=True, help="topic=container.*, subject=ID")
@click.option("--no-follow", is_flag=True, help="End at the last event there is")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="Output form")
@pass_app
def events_command(
    app: App, after: int, since: str | None, until: str | None, filters: tuple[str, ...], no_follow: bool, form: str
) -> None:
    """Show what happened, and what happens.

    Without --after and --since only new events are shown.
    """
    from corral.api.types.v1 import types_pb2
    from corral.cli.container import parse_time

    request = types_pb2.EventsRequest(after=after, no_follow=no_follow)
    request.since.CopyFrom(parse_time(since or ("1970-01-01" if after or no_follow else "0s")))
    if until:
        request.until.CopyFrom(parse_time(until))
    for text in filters:
        key, _, value = text.partition("=")
        if key not in ("topic", "subject") or not value:
            raise ValueError(f"filter {text!r} is not understood: give topic=… or subject=…")
        (request.topics if key == "topic" else request.subjects).append(value)
    for answer in app.client.system.events(request):
        if answer.HasField("gap"):
            click.echo(f"corral: events before {answer.gap.resumes_at} are no longer kept", err=True)
        for event in answer.events:
            click.echo(json.dumps(plain(event), ensure_ascii=False) if form == "json" else _line(event))
        sys.stdout.flush()


def _line(event: "types_pb2.Event") -> str:
    payload = plain(event.payload)
    assert isinstance(payload, dict)
    facts = " ".join(f"{k}={v}" for k, v in payload.items())
    return f"{event.seq} {event.time.ToJsonString()} {event.topic} {event.subject} {facts}".rstrip()
