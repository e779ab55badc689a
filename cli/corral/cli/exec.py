"""`corral exec` and `corral attach`."""

from collections.abc import Sequence

import click

from corral.cli.app import App, ContainerName, pass_app
from corral.cli.flags import SwitchCommand

_CONTEXT = {"allow_interspersed_args": False}


@click.command("exec", cls=SwitchCommand, context_settings=_CONTEXT)
@click.option("-i", "--interactive", "stdin", is_flag=True, help="Keep stdin open")
@click.option("-t", "--tty", "terminal", is_flag=True, help="Give it a terminal")
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the background")
@click.option("-e", "--env", multiple=True, help="Set an environment variable, NAME=VALUE, or NAME to pass it on")
@click.option("--env-file", multiple=True, type=click.Path(exists=True), help="Read environment variables from a file")
@click.option("-w", "--workdir", "working_dir", default="", help="Working directory inside")
@click.option("-u", "--user", default="", help="User: name or uid, with :group")
@click.option("--privileged", is_flag=True, help="All capabilities")
@click.option("--detach-keys", default="ctrl-p,ctrl-q", show_default=True, help="Keys that detach this terminal")
@click.argument("container", type=ContainerName())
@click.argument("args", nargs=-1, required=True, type=click.UNPROCESSED)
@pass_app
def exec_command(
    app: App,
    container: str,
    args: Sequence[str],
    stdin: bool,
    terminal: bool,
    detach: bool,
    env: Sequence[str],
    env_file: Sequence[str],
    working_dir: str,
    user: str,
    privileged: bool,
    detach_keys: str,
) -> int:
    """Run a further command in a running container; the exit code is the command's."""
    from corral.cli.detach_keys import parse_detach_keys
    from corral.cli.exit_status import exit_code
    from corral.cli.terminal import Session, require_terminal, window_size
    from corral.client.execution import Attachment

    keys = parse_detach_keys(detach_keys)
    if stdin and terminal and not detach:
        require_terminal()
    containers = app.client.containers
    made = containers.exec_create(
        container,
        args,
        env=_environment(env_file, env) if env or env_file else (),
        working_dir=working_dir,
        user=user,
        terminal=terminal,
        stdin=stdin,
        privileged=privileged,
        console_size=window_size() if terminal else None,
    )
    if detach:
        containers.exec_start(made.id, made.exec_id)
        return 0
    attachment = Attachment(
        made.id, made.exec_id, stdin=stdin, stdout=True, stderr=True, lossless=True, start=True, forget=True
    )
    status = Session(app.client, attachment, terminal=terminal, detach_keys=keys).run()
    return 0 if status is None else exit_code(status, "the process")


def _environment(files: Sequence[str], env: Sequence[str]) -> list[str]:
    from corral.cli.environment import passed_on
    from corral.client.options import environment

    return environment(passed_on(files, env))


@click.command("attach", cls=SwitchCommand)
@click.option("--no-stdin", is_flag=True, help="Do not send what is typed")
@click.option("--detach-keys", default="ctrl-p,ctrl-q", show_default=True, help="Keys that detach this terminal")
@click.option("--sig-proxy/--no-sig-proxy", default=True, help="Pass signals on to the container")
@click.argument("container", type=ContainerName())
@pass_app
def attach_command(app: App, container: str, no_stdin: bool, detach_keys: str, sig_proxy: bool) -> int:
    """Attach this terminal to a running container; the exit code is the container's."""
    from corral.api.engine.v1 import engine_pb2
    from corral.cli.detach_keys import parse_detach_keys
    from corral.cli.exit_status import exit_code
    from corral.cli.terminal import Session
    from corral.client.execution import Attachment
    from corral.rpc.errors import FailedPrecondition

    keys = parse_detach_keys(detach_keys)
    found = app.client.containers.get(container)
    if found.status not in (engine_pb2.STATUS_RUNNING, engine_pb2.STATUS_PAUSED):
        raise FailedPrecondition(f"container {container} does not run: start it with `corral start {container}`")
    session = Session(
        app.client,
        Attachment(
            found.id,
            stdin=found.config.stdin and not no_stdin,
            stdout=True,
            stderr=True,
            lossless=not found.config.terminal,
            replay=found.config.terminal,
        ),
        terminal=found.config.terminal,
        detach_keys=keys,
        signal_proxy=sig_proxy,
    )
    status = session.run()
    return 0 if status is None else exit_code(status)
