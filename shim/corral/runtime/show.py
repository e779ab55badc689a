"""state, list, ps."""

import json
import os
import sys

from corral.runtime import life, state
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.flags import SWITCH, VALUE, Flags, Options

LIST_FLAGS: Flags = {"format,f": VALUE, "quiet,q": SWITCH}
PS_FLAGS: Flags = {"format,f": VALUE}
_COLUMNS = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")


def print_state(context: Context, _options: Options, arguments: list[str]) -> int:
    """Print the state of the specification."""
    with state.opened(context.root, arguments[0], lock=None) as place:
        record = place.record()
        value = record.state(life.status_of(place, record))
    print_json(value, indent=2)
    return 0


def print_list(context: Context, options: Options, _arguments: list[str]) -> int:
    """Print all containers below the root."""
    form = _format(options)
    if context.named and not os.path.isdir(context.root):  # noqa: PTH112 - a string, as everything here
        raise CommandError(f"--root: no such directory: {context.root}")
    rows: list[dict[str, object]] = []
    for container_id in state.ids(context.root):
        try:
            with state.opened(context.root, container_id, lock=None) as place:
                record = place.record()
                rows.append(record.state(life.status_of(place, record)) | {"owner": _name(record.owner)})
        except state.Unreadable as e:
            context.log.warning(str(e))
        except CommandError:
            continue  # it went meanwhile, or is only just being made
    if options.on("quiet"):
        sys.stdout.write("".join(f"{row['id']}\n" for row in rows))
    elif form == "json":
        print_json(rows)
    else:
        _print_table([_COLUMNS, *(tuple(str(row[name.lower()]) for name in _COLUMNS) for row in rows)])
    return 0


def print_processes(context: Context, options: Options, arguments: list[str]) -> int:
    """Print the processes of a container, as pids or as ps(1) has them, whose options may follow."""
    form = _format(options)
    with state.opened(context.root, arguments[0], lock=None) as place:
        pids = life.needed_cgroup(place.record()).pids()
    if form == "json":
        print_json(pids)
    else:
        sys.stdout.write(_of_ps(arguments[1:] or ["-ef"], set(pids)))
    return 0


def _of_ps(words: list[str], pids: set[int]) -> str:
    """The lines of the host's ps about these processes."""
    out, inward = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, inward, 1)]
        child = os.posix_spawnp("ps", ["ps", *words], os.environ, file_actions=actions)
    except FileNotFoundError:
        raise CommandError("the host has no ps; --format json does without") from None
    finally:
        os.close(inward)
    with open(out, encoding="utf-8", errors="replace") as file:
        header, *lines = file.read().splitlines() or [""]
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise CommandError(f"ps {' '.join(words)} failed")
    titles = header.split()
    if "PID" not in titles:
        raise CommandError("couldn't find PID field in ps output")
    at = titles.index("PID")
    kept = [line for line in lines if line.split()[at : at + 1] and _number(line.split()[at]) in pids]
    return "".join(f"{line}\n" for line in [header, *kept])


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _format(options: Options) -> str:
    form = options.text("format", "table")
    if form not in ("table", "json"):
        raise CommandError(f"invalid format option {form!r}: table or json is wanted")
    return form


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:<{max(width, 8) + 4}}" for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("".join(cells).rstrip() + "\n")


def print_json(value: object, *, indent: int | None = None) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=indent, separators=None if indent else (",", ":")) + "\n")
