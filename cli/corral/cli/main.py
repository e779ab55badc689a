"""What `corral` does: which verb lives where, global options, and how errors end."""

import importlib
import os
import sys
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, complain

if TYPE_CHECKING:
    from collections.abc import Sequence

# verb -> (module, line in the help). The help is here so that `corral --help` loads no module.
VERBS: dict[str, tuple[str, str]] = {
    "run": ("run", "Create a container and run a command in it"),
    "create": ("run", "Create a container without starting it"),
    "start": ("container", "Start containers"),
    "stop": ("container", "Stop containers: their stop signal, then SIGKILL"),
    "restart": ("container", "Stop and start containers"),
    "kill": ("container", "Send a signal to containers"),
    "rm": ("container", "Remove containers"),
    "ps": ("container", "List containers"),
    "inspect": ("container", "Show all facts about containers or images, as JSON"),
    "logs": ("container", "Show a container's log"),
    "exec": ("exec", "Run a further command in a running container"),
    "attach": ("exec", "Attach this terminal to a running container"),
    "pause": ("container", "Freeze every process of containers"),
    "port": ("port", "Show which ports of the host lead to a container's; add, rm"),
    "update": ("update", "Change limits, restart policy and labels of containers"),
    "unpause": ("container", "Let paused containers go on"),
    "wait": ("container", "Wait until containers end; print their exit codes"),
    "cp": ("copy", "Copy files between a container and this host"),
    "commit": ("commit", "Make an image of what a container has written"),
    "diff": ("commit", "Show what a container has changed in its files"),
    "export": ("commit", "Write a container's root file system as a tar"),
    "rename": ("container", "Give a container another name"),
    "top": ("container", "List the processes of a container"),
    "stats": ("container", "Show what containers use"),
    "events": ("events", "Show what happened, and what happens"),
    "container": ("container_group", "Containers: all of the above by their noun, ls and prune"),
    "image": ("image", "Images: pull, push, import, save, load, ls, inspect, history, mount, tag, rm, prune"),
    "history": ("history", "Show how an image came to be"),
    "images": ("image", "List images"),
    "rmi": ("image", "Remove images"),
    "tag": ("image", "Give an image another name"),
    "pull": ("registry", "Fetch an image from a registry"),
    "push": ("registry", "Bring an image to a registry"),
    "save": ("archive", "Write images to an archive"),
    "load": ("archive", "Take images from an archive"),
    "import": ("image", "Make an image of a root file system's tar, or take those of an archive"),
    "login": ("registry", "Prove who you are to a registry"),
    "logout": ("registry", "Forget a login"),
    "snapshot": ("snapshot", "Snapshots: ls, inspect, mounts, usage, rm, drivers"),
    "network": ("network", "Networks: create, ls, inspect, connect, disconnect, explain, rm, prune"),
    "secret": ("secret", "Secrets: create, ls, inspect, rm"),
    "volume": ("volume", "Volumes: create, ls, inspect, rm, prune"),
    "system": ("system", "The engine: info, version, check-host, df, check, prune"),
    "info": ("system", "Show what the daemon runs on, and with"),
    "version": ("system", "Show the versions of client and daemon"),
    "completion": ("completion", "Print a completion script for a shell"),
}
# Exit code of `run`, `create` and `exec` when corral itself failed, as docker has it.
ENGINE_FAILED = 125
# As if SIGPIPE had ended it.
NO_READER = 141


def load_verb(verb: str) -> click.Command:
    """The command of one of VERBS."""
    command = getattr(importlib.import_module(f"corral.cli.{VERBS[verb][0]}"), f"{verb}_command")
    assert isinstance(command, click.Command)
    return command


class LazyGroup(click.Group):
    """A group whose verbs are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return load_verb(cmd_name)

    def invoke(self, ctx: click.Context) -> object:
        """As click's own, to which a reader that went away is a failure like any other."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            return _reader_left()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-a", "--address", metavar="ADDRESS", help="unix:///path or tcp://host:port  [env: CORRAL_ADDRESS]")
@click.option("-n", "--namespace", metavar="NAME", help="Namespace to work in  [env: CORRAL_NAMESPACE]")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks")
@click.pass_context
def cli(ctx: click.Context, address: str | None, namespace: str | None) -> None:
    """Run and look after containers."""
    ctx.obj = App(address, namespace)


def main(argv: "Sequence[str] | None" = None) -> int:
    """Runs one command; its exit code. What it wrote is out, or the code tells."""
    args = list(sys.argv[1:] if argv is None else argv)
    _open_standard_streams()
    try:
        code = cli.main(args, prog_name="corral", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as e:
        code = e.exit_code
    except click.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except click.ClickException as e:
        e.show()
        code = ENGINE_FAILED if _verb(args) in ("run", "create") else e.exit_code
    except BrokenPipeError:
        code = _reader_left()
    except SystemExit as e:  # click has written completions, or help that nobody reads
        code = e.code
    except Exception as e:
        if _wants_traceback(args):
            raise
        code = _report(e, args)
    return code if isinstance(code, int) else 0


def _reader_left() -> int:
    """Nobody is left to be told; what is still to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return NO_READER


def _open_standard_streams() -> None:
    """A stream that the caller has closed reads and writes nothing; else the next file opened would be in its place."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - stays


def _wants_traceback(args: "Sequence[str]") -> bool:
    """--debug before the verb; after it, it may be the container's."""
    verb = _verb(args)
    return "--debug" in (args[: args.index(verb)] if verb else args)


def _report(error: Exception, args: "Sequence[str]") -> int:
    if not _is_for_users(error):
        complain(f"{type(error).__name__}: {error} (this is a fault of corral; --debug shows where)")
        return ENGINE_FAILED if _verb(args) in ("run", "create") else 1
    if isinstance(error, UnicodeEncodeError):
        error = ValueError(f"{error.object!r} is not UTF-8: names, arguments and variables must be")
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        error = ValueError(f"{os.fsdecode(error.filename)}: {error.strerror}")  # without "[Errno 2]"
    complain(error)
    if _verb(args) not in ("run", "create", "exec"):
        return 1
    match getattr(error, "reason", ""):
        case "EXEC_NOT_FOUND":
            return 127
        case "EXEC_DENIED":
            return 126
        case _:
            return 1 if _verb(args) == "exec" else ENGINE_FAILED


def _is_for_users(error: Exception) -> bool:
    """Whether its text is. That something could not be loaded may be what it says."""
    if isinstance(error, ValueError | OSError):
        return True
    try:
        from corral.rpc.errors import CorralError
    except Exception:  # noqa: BLE001 - then it is none of them
        return False
    return isinstance(error, CorralError)


def _verb(args: "Sequence[str]") -> str:
    """What is to be done, be it by its noun: `corral container run` is run."""
    return next((a for a in args if a in VERBS and a != "container"), "")
