"""Verbs on containers that exist."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from corral.cli import template
from corral.cli.app import App, ContainerName, complain, each, pass_app
from corral.cli.flags import SwitchCommand
from corral.cli.output import enum_word, format_option, human_age, human_memory, human_size, show_json, show_rows

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from corral.api.engine.v1 import engine_pb2
    from corral.api.images.v1 import images_pb2
    from corral.cli.output import Json

_names = click.argument("containers", nargs=-1, required=True, type=ContainerName())
_name = click.argument("container", type=ContainerName())
_SHORT_ID = 12


@click.command("start", cls=SwitchCommand)
@click.option("-a", "--attach", is_flag=True, help="Attach this terminal")
@click.option("-i", "--interactive", is_flag=True, help="Attach stdin")
@click.option("--detach-keys", default="ctrl-p,ctrl-q", show_default=True, help="Keys that detach this terminal")
@click.option("--sig-proxy/--no-sig-proxy", default=True, help="Pass signals on to the container")
@_names
@pass_app
def start_command(
    app: App, containers: tuple[str, ...], attach: bool, interactive: bool, detach_keys: str, sig_proxy: bool
) -> int:
    """Start containers."""
    if not attach and not interactive:
        return each(containers, app.client.containers.start)
    if len(containers) != 1:
        raise click.UsageError("only one container can be attached")
    from corral.cli.detach_keys import parse_detach_keys
    from corral.cli.exit_status import exit_code
    from corral.cli.terminal import Session
    from corral.client.execution import Attachment

    keys = parse_detach_keys(detach_keys)
    found = app.client.containers.start(containers[0], create_only=True)
    session = Session(
        app.client,
        Attachment(found.id, stdin=interactive and found.config.stdin, stdout=True, stderr=True, lossless=True),
        terminal=found.config.terminal,
        detach_keys=keys,
        signal_proxy=sig_proxy,
    )
    status = session.run(lambda: app.client.containers.start(found.id))
    return 0 if status is None else exit_code(status)


@click.command("stop")
@click.option("-t", "--time", "--timeout", "grace_s", type=float, help="Seconds until SIGKILL, default 10")
@click.option("-s", "--signal", default="", help="Signal to send first")
@_names
@pass_app
def stop_command(app: App, containers: tuple[str, ...], grace_s: float | None, signal: str) -> int:
    """Stop containers: their stop signal, then SIGKILL."""
    stop = app.client.containers.stop
    return each(containers, lambda c: stop(c, timeout_s=grace_s, signal=signal), at_once=True)


@click.command("restart")
@click.option("-t", "--time", "--timeout", "grace_s", type=float, help="Seconds until SIGKILL, default 10")
@click.option("-s", "--signal", default="", help="Signal to send first")
@_names
@pass_app
def restart_command(app: App, containers: tuple[str, ...], grace_s: float | None, signal: str) -> int:
    """Stop and start containers."""
    restart = app.client.containers.restart
    return each(containers, lambda c: restart(c, timeout_s=grace_s, signal=signal), at_once=True)


@click.command("kill")
@click.option("-s", "--signal", default="KILL", show_default=True, help="Signal, by name or number")
@click.option("--all", "everyone", is_flag=True, help="To every process of the container")
@_names
@pass_app
def kill_command(app: App, containers: tuple[str, ...], signal: str, everyone: bool) -> int:
    """Send a signal to containers."""
    kill = app.client.containers.kill
    return each(containers, lambda c: kill(c, signal, everyone=everyone), at_once=True)


@click.command("rm")
@click.option("-f", "--force", is_flag=True, help="Kill what runs; what is not there is no error")
@click.option("-v", "--volumes", is_flag=True, help="Remove their anonymous volumes too")
@_names
@pass_app
def rm_command(app: App, containers: tuple[str, ...], force: bool, volumes: bool) -> int:
    """Remove containers."""
    remove = app.client.containers.remove
    return each(containers, lambda c: remove(c, force=force, volumes=volumes), may_be_gone=force, at_once=True)


@click.command("pause")
@_names
@pass_app
def pause_command(app: App, containers: tuple[str, ...]) -> int:
    """Freeze every process of containers."""
    return each(containers, app.client.containers.pause, at_once=True)


@click.command("unpause")
@_names
@pass_app
def unpause_command(app: App, containers: tuple[str, ...]) -> int:
    """Let paused containers go on."""
    return each(containers, app.client.containers.resume, at_once=True)


@click.command("wait")
@click.option(
    "--condition",
    type=click.Choice(["not-running", "next-exit", "removed"]),
    default="not-running",
    show_default=True,
    help="What to wait for",
)
@_names
@pass_app
def wait_command(app: App, containers: tuple[str, ...], condition: str) -> int:
    """Wait until containers end; print their exit codes."""
    return each(containers, lambda c: app.client.containers.wait(c, condition), show=lambda _, exit_: str(exit_.code))


@click.command("rename")
@_name
@click.argument("new_name")
@pass_app
def rename_command(app: App, container: str, new_name: str) -> None:
    """Give a container another name."""
    app.client.containers.rename(container, new_name)


@click.command("ps")
@click.option("-a", "--all", "everything", is_flag=True, help="Also those that do not run")
@click.option("-f", "--filter", "filters", multiple=True, help="KEY=VALUE: name, id, status, health, label, image…")
@click.option("-n", "--last", type=int, default=-1, help="Only the N made last, whether they run or not")
@click.option("-l", "--latest", is_flag=True, help="Only the one made last, whether it runs or not")
@click.option("--no-trunc", is_flag=True, help="Whole ids and commands")
@click.option("-s", "--size", is_flag=True, help="What each has written, and how much that is with its image")
@format_option
@pass_app
def ps_command(
    app: App,
    everything: bool,
    filters: Sequence[str],
    last: int,
    latest: bool,
    no_trunc: bool,
    size: bool,
    form: str,
    quiet: bool,
) -> None:
    """List containers."""
    wanted: dict[str, list[str]] = {}
    for text in filters:
        key, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"filter {text!r} is not understood: give KEY=VALUE")
        wanted.setdefault(key, []).append(value)
    count = 1 if latest else last
    everything = everything or count >= 0 or not wanted.keys().isdisjoint(("status", "exited"))
    containers = app.client.containers.list(all=everything, filters=dict(wanted), size=size)
    if count >= 0:
        containers = containers[:count]  # the newest come first
    show_rows(
        ("CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES", *(["SIZE"] if size else [])),
        [(*_ps_row(c, no_trunc), *([_size(c)] if size else [])) for c in containers],
        containers,
        form,
        [c.id if no_trunc else c.id[:_SHORT_ID] for c in containers] if quiet else None,
    )


def _ps_row(c: "engine_pb2.Container", no_trunc: bool) -> tuple[str, ...]:
    command = " ".join([*c.config.entrypoint, *c.config.args])
    ports = ", ".join(
        f"{p.host_ip or '0.0.0.0'}:{p.host_port}->{p.container_port}/{p.protocol or 'tcp'}" for p in c.endpoint.ports
    )
    return (
        c.id if no_trunc else c.id[:_SHORT_ID],
        c.config.image,
        command if no_trunc or len(command) <= 30 else f"{command[:29]}…",
        f"{human_age(c.created_at)} ago",
        _status(c),
        ports,
        c.name,
    )


def _size(c: "engine_pb2.Container") -> str:
    quota = f" of {human_size(c.config.storage_quota_bytes)}" if c.config.storage_quota_bytes else ""
    return f"{human_size(c.size_rw_bytes)}{quota} (virtual {human_size(c.size_root_bytes)})"


_HEALTH = ("", " (health: starting)", " (healthy)", " (unhealthy)")


def _status(c: "engine_pb2.Container") -> str:
    from corral.api.engine.v1 import engine_pb2

    if c.status in (engine_pb2.STATUS_RUNNING, engine_pb2.STATUS_PAUSED):
        paused = " (Paused)" if c.status == engine_pb2.STATUS_PAUSED else ""
        return f"Up {human_age(c.started_at)}{paused or _HEALTH[c.health.state]}"
    if c.status == engine_pb2.STATUS_EXITED:
        why = " OOM" if c.exit.oom_killed else " (timed out)" if c.exit.timed_out else ""
        return f"Exited ({c.exit.code}) {human_age(c.finished_at)} ago{why}"
    if c.status == engine_pb2.STATUS_RESTARTING:
        return f"Restarting ({c.exit.code}) {human_age(c.finished_at)} ago"
    return enum_word(engine_pb2.Status.Name(c.status), "Status").capitalize()


@click.command("inspect")
@click.option("-s", "--size", is_flag=True, help="Its size too, which takes time")
@click.option(
    "-f", "--format", "form", default="json", metavar="TEMPLATE", help="Such as '{{.Status}}' instead of JSON"
)
@click.option("--type", "kind", type=click.Choice(["container", "image"]), help="What to look for; else for either")
@_names
@pass_app
def inspect_command(app: App, containers: tuple[str, ...], size: bool, form: str, kind: str | None) -> int:
    """Show all facts about containers, or images where no container has the name, as JSON."""
    from corral.rpc import errors

    found, failed = [], 0
    for name in containers:
        try:
            found.append(_inspected(app, name, kind, size=size))
        except errors.CorralError as e:
            complain(e)
            failed = 1
    show_json(found, form, more=_names_of_docker)
    return failed


def _names_of_docker(message: "Message") -> "dict[str, Json]":
    from corral.api.engine.v1 import engine_pb2
    from corral.cli.docker_names import names_of

    return names_of(message) if isinstance(message, engine_pb2.Container) else {}


def _inspected(app: App, name: str, kind: str | None, *, size: bool) -> "engine_pb2.Container | images_pb2.Image":
    from corral.rpc import errors

    if kind == "image":
        return app.client.images.get(name)
    try:
        return app.client.containers.get(name, size=size)
    except (errors.NotFound, errors.InvalidArgument) as e:
        if kind == "container":
            raise
        try:
            return app.client.images.get(name)
        except (errors.NotFound, errors.InvalidArgument):
            raise e from None


@click.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on as more is written")
@click.option("--since", help="Only from this time: RFC 3339, or how long ago, such as 10m")
@click.option("--until", help="Only up to this time")
@click.option("-n", "--tail", default="all", metavar="N", help="Only the last N lines")
@click.option("-t", "--timestamps", is_flag=True, help="Show when each line was written")
@click.option("--reopen", is_flag=True, help="Show nothing: have it opened again by its name, as after a rotation")
@_name
@pass_app
def logs_command(
    app: App,
    container: str,
    follow: bool,
    since: str | None,
    until: str | None,
    tail: str,
    timestamps: bool,
    reopen: bool,
) -> None:
    """Show a container's log."""
    if reopen:
        app.client.containers.reopen_log(container)
        return
    from corral.api.tasks.v1 import tasks_pb2
    from corral.cli.moments import parse_moment, to_text

    entries = app.client.containers.logs(
        container,
        follow=follow,
        since=parse_moment(since) if since else None,
        until=parse_moment(until) if until else None,
        tail=_tail(tail),
    )
    begins_line = {1: True, 2: True}
    for entry in entries:
        fd = 2 if entry.stream == tasks_pb2.LogEntry.STREAM_STDERR else 1
        stream = sys.stderr.buffer if fd == 2 else sys.stdout.buffer
        if timestamps and begins_line[fd]:
            stream.write(to_text(entry.time).encode() + b" ")
        stream.write(entry.line)
        begins_line[fd] = not entry.partial
        if follow:
            stream.flush()


def _tail(text: str) -> int | None:
    """As docker: all, or a negative number, is every line."""
    try:
        return None if text == "all" or int(text) < 0 else int(text)
    except ValueError:
        raise ValueError(f"--tail {text!r} is not understood: give a number of lines, or all") from None


@click.command("top", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_name
@click.argument("ps_options", nargs=-1, type=click.UNPROCESSED)
@pass_app
def top_command(app: App, container: str, ps_options: Sequence[str]) -> None:
    """List the processes of a container, or what `ps PS_OPTIONS` on the daemon's host has to say of them."""
    if ps_options:
        answer = app.client.containers.ps(container, ps_options)
        show_rows(tuple(answer.titles), [tuple(row.fields) for row in answer.rows], answer.rows, "table", None)
        return
    processes = app.client.containers.top(container)
    rows = [(str(p.uid), str(p.pid), str(p.parent_pid), f"{p.cpu_ns / 1e9:.2f}s", p.command) for p in processes]
    show_rows(("UID", "PID", "PPID", "CPU", "COMMAND"), rows, processes, "table", None)


@click.command("stats")
@click.option("--no-stream", is_flag=True, help="One reading, then end")
@click.option(
    "--format",
    "form",
    type=template.OutputForm(),
    default="table",
    show_default=True,
    metavar="table|json|TEMPLATE",
    help="Output form; a template as for docker: '{{.CPUPerc}}'",
)
@click.argument("containers", nargs=-1, type=ContainerName())
@pass_app
def stats_command(app: App, containers: tuple[str, ...], no_stream: bool, form: str) -> None:
    """Show what containers use."""
    before: dict[str, engine_pb2.ContainerStats] = {}
    # CPU use is a difference of two readings.
    for reading, answer in enumerate(app.client.containers.stats(containers, interval_ms=500 if no_stream else 1000)):
        rows = [_stats_row(s, before.get(s.id)) for s in answer.stats]
        if not no_stream and form == "table" and sys.stdout.isatty():
            click.clear()
        if reading or not no_stream:
            show_rows(_STATS if form == "table" else _STATS_IN_TEMPLATES, rows, answer.stats, form, None)
        if reading and no_stream:
            return
        before = {s.id: s for s in answer.stats}


_STATS = (
    *("CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "NET I/O", "BLOCK I/O"),
    *("DISK / QUOTA", "PIDS"),
)
_STATS_IN_TEMPLATES = (
    *("Container ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO"),
    *("Quota", "PIDs"),
)
"""What docker calls these columns."""


def _stats_row(now: "engine_pb2.ContainerStats", before: "engine_pb2.ContainerStats | None") -> tuple[str, ...]:
    cpu = 0.0
    if before is not None:
        elapsed = now.cgroup.read_at.ToNanoseconds() - before.cgroup.read_at.ToNanoseconds()
        used = now.cgroup.cpu.usage_ns - before.cgroup.cpu.usage_ns
        cpu = 100 * used / elapsed if elapsed > 0 else 0.0
    memory, io, net, quota = now.cgroup.memory, now.cgroup.io, now.interfaces, now.storage.quota_bytes
    share = f"{100 * memory.working_set_bytes / memory.limit_bytes:.2f}%" if memory.limit_bytes else "-"
    return (
        now.id[:_SHORT_ID],
        now.name,
        f"{cpu:.2f}%",
        f"{human_memory(memory.working_set_bytes)} / {human_memory(memory.limit_bytes) if memory.limit_bytes else '-'}",
        share,
        f"{human_size(sum(i.rx_bytes for i in net))} / {human_size(sum(i.tx_bytes for i in net))}" if net else "-",
        f"{human_size(sum(i.read_bytes for i in io))} / {human_size(sum(i.write_bytes for i in io))}",
        f"{human_size(now.storage.used_bytes)} / {human_size(now.storage.quota_bytes)}" if quota else "-",
        str(now.cgroup.pids.current),
    )
