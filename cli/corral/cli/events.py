"""`corral events`."""

import json
import sys
from typing import TYPE_CHECKING

import click

from corral.cli import template
from corral.cli.app import App, pass_app
from corral.cli.output import plain

if TYPE_CHECKING:
    from corral.api.types.v1 import types_pb2


@click.command("events")
@click.option("--after", type=click.IntRange(min=0), help="All after this sequence number; 0: from the first")
@click.option("--since", help="Only from this time: RFC 3339, or how long ago, such as 10m")
@click.option("--until", help="Only up to this time, then end")
@click.option("-f", "--filter", "filters", multiple=True, help="topic=, subject=, container=, image=, type=, event=")
@click.option("--no-follow", is_flag=True, help="End at the last event there is")
@click.option(
    "--format", "form", type=template.OutputForm("text"), default="text", help="text, json, or '{{.Type}} {{.Action}}'"
)
@pass_app
def events_command(
    app: App,
    after: int | None,
    since: str | None,
    until: str | None,
    filters: tuple[str, ...],
    no_follow: bool,
    form: str,
) -> None:
    """Show what happened, and what happens.

    Without --after and --since only new events are shown. Whoever keeps the number of the last event it has dealt with,
    and gives it to --after, gets each event once, whatever dies meanwhile.
    """
    from corral.api.types.v1 import types_pb2
    from corral.cli.moments import parse_moment

    request = types_pb2.EventsRequest(after=after or 0, no_follow=no_follow)
    request.since.CopyFrom(parse_moment(since or ("0s" if after is None and not no_follow else "1970-01-01T00:00:00Z")))
    if until:
        request.until.CopyFrom(parse_moment(until))
    _apply_filters(app, request, filters)
    for answer in app.client.system.events(request):
        if answer.HasField("gap"):
            click.echo(f"corral: events before {answer.gap.resumes_at} are no longer kept", err=True)
        for event in answer.events:
            click.echo(_told(event, form))
        sys.stdout.flush()


# What docker calls what happens, and those of its words that are ours.
_EVENTS = {
    "create": "*.created",
    "destroy": "container.removed",
    "die": "container.died",
    "exec_die": "task.exec.exited",
    "exec_start": "task.exec.started",
    "health_status": "container.checked",
    "oom": "task.oom",
    "pause": "container.paused",
    "pressure": "cgroup.pressure",
    "pull": "image.pulled",
    "remove": "*.removed",
    "rename": "container.renamed",
    "start": "container.started",
    "stop": "container.stopped",
    "tag": "image.tagged",
    "unpause": "container.unpaused",
}
_NAMES = ("Type", "Action", "ID", "Actor.ID", "TimeNano")
_KINDS = ("container", "image", "volume", "network", "snapshot", "task", "endpoint", "cgroup", "content")


def _apply_filters(app: App, request: "types_pb2.EventsRequest", filters: tuple[str, ...]) -> None:
    """As docker: values of one key are or'ed, keys are and'ed."""
    kinds, names = [], []
    for text in filters:
        key, _, value = text.partition("=")
        match key:
            case "topic" if value:
                request.topics.append(value)
            case "subject" | "image" | "volume" | "network" if value:
                request.subjects.append(value)
            case "container" if value:
                request.subjects.append(_id_of(app, value))
            case "type" if value in _KINDS:
                kinds.append(value)
            case "event" if value in _EVENTS:
                names.append(_EVENTS[value])
            case "type":
                raise ValueError(f"{value!r} is nothing that events are about: it is one of {', '.join(_KINDS)}")
            case "event":
                raise ValueError(f"{value!r} is no event: it is one of {', '.join(_EVENTS)}; or give topic=…")
            case _:
                raise ValueError(f"filter {text!r} is not understood: give container=, image=, type=, event= or topic=")
    request.topics.extend(_topics(kinds, names))


def _topics(kinds: list[str], names: list[str]) -> list[str]:
    if not names:
        return [f"{kind}.*" for kind in kinds]
    patterns = []
    for name in names:
        about = name.partition(".")[0]
        if about != "*":
            patterns += [name] if not kinds or about in kinds or (about == "task" and "container" in kinds) else []
        else:
            patterns += [f"{kind}{name[1:]}" for kind in kinds or _KINDS]
    return patterns or ["none.of.these"]


def _id_of(app: App, name: str) -> str:
    """A container's id; what is no container any more may be the id of one that was."""
    from corral.rpc.errors import CorralError

    try:
        return app.client.containers.get(name).id
    except CorralError:
        return name


def _told(event: "types_pb2.Event", form: str) -> str:
    if form == "text":
        return _line(event)
    document = plain(event)
    if form == "json":
        return json.dumps(document, ensure_ascii=False)
    kind, _, action = event.topic.partition(".")
    row = template.row_of(_NAMES, (kind, action, event.subject, event.subject, str(event.time.ToNanoseconds())))
    return template.render(form, document, row)


def _line(event: "types_pb2.Event") -> str:
    payload = plain(event.payload)
    assert isinstance(payload, dict)
    facts = " ".join(f"{k}={v}" for k, v in payload.items())
    return f"{event.seq} {event.time.ToJsonString()} {event.topic} {event.subject} {facts}".rstrip()
