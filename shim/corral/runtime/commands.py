"""The global flags, then one command, whose module is loaded only then."""

import os
import stat
import sys
from collections.abc import Callable
from importlib import import_module

from corral.kernel.privilege import is_hosts_root
from corral.oci import OCI_VERSION
from corral.oci.errors import ExecFailed
from corral.runtime import index
from corral.runtime.context import Context
from corral.runtime.errors import EXEC_CODE, UNKNOWN_COMMAND_CODE, USAGE_CODE, CommandError, sentence
from corral.runtime.flags import SWITCH, VALUE, Flags, Options, parse
from corral.runtime.log import Log

VERSION = "0.1.0"

type Command = Callable[[Context, Options, list[str]], int]

GLOBAL_FLAGS: Flags = {
    "root": VALUE,
    "log": VALUE,
    "log-format": VALUE,
    "debug": SWITCH,
    "systemd-cgroup": SWITCH,
    "rootless": VALUE,
    "cgroup-manager": VALUE,
    "criu": VALUE,
    "version,v": SWITCH,
}

# Name: module, function, name of its flags in the module, least and most arguments, and how it is called. With any
# number of arguments (None) the flags come before them: what follows are another command's.
COMMANDS: dict[str, tuple[str, str, str, int, int | None, str]] = {
    "create": ("create", "create", "CREATE_FLAGS", 1, 1, "ID"),
    "start": ("start", "start", "", 1, 1, "ID"),
    "run": ("create", "run", "RUN_FLAGS", 1, 1, "ID"),
    "state": ("show", "print_state", "", 1, 1, "ID"),
    "list": ("show", "print_list", "LIST_FLAGS", 0, 0, ""),
    "ps": ("show", "print_processes", "PS_FLAGS", 1, None, "ID [PS OPTION...]"),
    "exec": ("execute", "execute", "EXEC_FLAGS", 1, None, "ID [COMMAND ARGUMENT...]"),
    "kill": ("remove", "kill", "KILL_FLAGS", 1, 2, "ID [SIGNAL]"),
    "delete": ("remove", "delete", "DELETE_FLAGS", 1, 1, "ID"),
    "pause": ("control", "pause", "", 1, 1, "ID"),
    "resume": ("control", "resume", "", 1, 1, "ID"),
    "update": ("control", "update", "UPDATE_FLAGS", 1, 1, "ID"),
    "events": ("events", "events", "EVENTS_FLAGS", 1, 1, "ID"),
    "spec": ("template", "print_spec", "SPEC_FLAGS", 0, 0, ""),
    "features": ("template", "print_features", "", 0, 0, ""),
    "checkpoint": ("template", "checkpoint", "CHECKPOINT_FLAGS", 0, None, "ID"),
    "restore": ("template", "restore", "CHECKPOINT_FLAGS", 0, None, "ID"),
}


def run() -> int:
    """Run the command of sys.argv; the exit code."""
    log = Log()
    code = USAGE_CODE
    try:
        options, words = parse(sys.argv[1:], GLOBAL_FLAGS)
        if options.on("version"):
            sys.stdout.write(f"corral-oci version {VERSION}\nspec: {OCI_VERSION}\n")
            return 0
        log = Log(options.text("log"), form=options.text("log-format", "text"), debug=options.on("debug"))
        if options.on("help") or not words:
            sys.stdout.write(_usage())
            return 0
        code = EXEC_CODE if words[0] == "exec" else 1
        return _dispatch(options, log, words)
    except CommandError as e:
        log.error(str(e))
        return e.code if e.code != 1 else code
    except ExecFailed as e:
        log.error(e.message)
    except OSError as e:
        log.error(sentence(e))
    except ValueError as e:
        log.error(str(e))
    except Exception as e:  # the client reads its reason in the log, whatever it is
        if log.debugging:
            raise
        log.error(f"internal error, --debug shows where: {type(e).__name__}: {e}")
    return code


def _dispatch(options: Options, log: Log, words: list[str]) -> int:
    name, *rest = words
    if name == "help":
        if not rest:
            sys.stdout.write(_usage())
            return 0
        name, rest = rest[0], ["--help"]
    if name not in COMMANDS:
        raise CommandError(f"No help topic for {name!r}; --help lists the commands", UNKNOWN_COMMAND_CODE)
    module_name, function, flags_name, least, most, usage = COMMANDS[name]
    index.load(module_name)
    module = import_module(f"corral.runtime.{module_name}")
    flags: Flags = getattr(module, flags_name) if flags_name else {}
    own, arguments = parse(rest, flags, anywhere=most is not None)
    if own.on("help"):
        sys.stdout.write(_usage_of(name, flags, usage))
        return 0
    if len(arguments) < least or (most is not None and len(arguments) > most):
        raise CommandError(_miscounted(name, least, most, usage))
    manager = _cgroup_manager(options)
    context = Context(
        _root(options),
        log,
        rootless=_rootless(options),
        with_cgroups=manager != "disabled",
        systemd=manager == "systemd",
        named=options.has("root"),
    )
    command: Command = getattr(module, function)
    return command(context, own, arguments)


def _miscounted(name: str, least: int, most: int | None, usage: str) -> str:
    wanted = f"exactly {least}" if least == most else f"a minimum of {least}"
    if most is not None and most != least:
        wanted += f" and a maximum of {most}"
    return f'"{name}" requires {wanted} argument(s); usage: corral-oci {name} [FLAG...] {usage}'.rstrip()


def _cgroup_manager(options: Options) -> str:
    """Which one is asked for, as clients ask crun for it."""
    manager = options.text("cgroup-manager", "cgroupfs")
    if manager not in ("cgroupfs", "systemd", "disabled"):
        raise CommandError(f"--cgroup-manager: {manager!r} is neither cgroupfs, systemd nor disabled")
    return "systemd" if options.on("systemd-cgroup") else manager


def _rootless(options: Options) -> bool | None:
    """None: as it turns out."""
    text = options.text("rootless", "auto")
    if text not in ("true", "false", "auto"):
        raise CommandError(f"--rootless: {text!r} is neither true, false nor auto")
    return None if text == "auto" else text == "true"


def _root(options: Options) -> str:
    """Where the state is. As runc has it: root of a user namespace is somebody else outside, and has a place of his."""
    if root := options.text("root"):
        return os.path.abspath(root)  # noqa: PTH100 - a string is what is wanted
    uid, own = os.geteuid(), os.environ.get("XDG_RUNTIME_DIR")
    if is_hosts_root() or (uid == 0 and (not own or os.environ.get("USER") == "root")):
        return "/run/corral-oci"
    root = f"{own or f'/run/user/{uid}'}/corral-oci"
    if own:
        _keep(root)
    return root


def _keep(directory: str) -> None:
    """Make a directory that nobody clears away. Source: XDG Base Directory Specification, on the sticky bit."""
    os.makedirs(directory, 0o700, exist_ok=True)  # noqa: PTH103 - likewise
    os.chmod(directory, 0o700 | stat.S_ISVTX)  # noqa: PTH101 - likewise


def _usage() -> str:
    lines = ["usage: corral-oci [GLOBAL FLAG...] COMMAND [FLAG...] [ARGUMENT...]", "", "global flags:"]
    lines += _flag_lines(GLOBAL_FLAGS)
    lines += ["", "commands (each has --help):"]
    lines += [f"  {name} {entry[5]}".rstrip() for name, entry in COMMANDS.items()]
    return "\n".join(lines) + "\n"


def _usage_of(name: str, flags: Flags, arguments: str) -> str:
    lines = ["NAME:", f"   corral-oci {name}", "", "USAGE:"]
    lines += [f"   corral-oci {name} [FLAG...] {arguments}".rstrip(), "", "OPTIONS:"]
    return "\n".join([*lines, *_flag_lines({**flags, "help,h": SWITCH})]) + "\n"


def _flag_lines(flags: Flags) -> list[str]:
    spellings = ((spelling.partition(","), kind) for spelling, kind in flags.items())
    return [
        f"  --{name}{'' if kind == SWITCH else ' VALUE'}{f', -{letter}' if letter else ''}"
        for (name, _, letter), kind in spellings
    ]
