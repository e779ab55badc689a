"""pause, resume, update."""

import json
import sys

from corral.oci.decode import decode
from corral.oci.limits import changes_of
from corral.oci.spec import Resources
from corral.runtime import life, state
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.flags import VALUE, Flags, Options

# Flag: the members of linux.resources it stands for.
_NUMBERS = {
    "blkio-weight": ("blockIO", "weight"),
    "cpu-burst": ("cpu", "burst"),
    "cpu-idle": ("cpu", "idle"),
    "cpu-period": ("cpu", "period"),
    "cpu-quota": ("cpu", "quota"),
    "cpu-rt-period": ("cpu", "realtimePeriod"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime"),
    "cpu-share": ("cpu", "shares"),
    "memory": ("memory", "limit"),
    "memory-reservation": ("memory", "reservation"),
    "memory-swap": ("memory", "swap"),
    "pids-limit": ("pids", "limit"),
}
_TEXTS = {"cpuset-cpus": ("cpu", "cpus"), "cpuset-mems": ("cpu", "mems")}
_REFUSED = ("l3-cache-schema", "mem-bw-schema")
UPDATE_FLAGS: Flags = {"resources,r": VALUE} | dict.fromkeys([*_NUMBERS, *_TEXTS, *_REFUSED], VALUE)
_SUFFIXES = {"k": 10, "m": 20, "g": 30, "t": 40}


def pause(context: Context, _options: Options, arguments: list[str]) -> int:
    """Stop every process of a running container."""
    with state.opened(context.root, arguments[0]) as place:
        record = place.record()
        life.check("pause", place, record)
        life.needed_cgroup(record).freeze()
    return 0


def resume(context: Context, _options: Options, arguments: list[str]) -> int:
    """Let them run again."""
    with state.opened(context.root, arguments[0]) as place:
        record = place.record()
        life.check("resume", place, record)
        life.needed_cgroup(record).thaw()
    return 0


def update(context: Context, options: Options, arguments: list[str]) -> int:
    """Change the limits of a container that has not ended: all of those asked for, or none."""
    changes = changes_of(decode(Resources, _wanted(options), "resources"))
    with state.opened(context.root, arguments[0]) as place:
        record = place.record()
        life.check("update", place, record)
        group = life.needed_cgroup(record)
        if record.unit:
            from corral.runtime import units

            units.update(record, group, changes)
        else:
            group.apply(changes)
    return 0


def _wanted(options: Options) -> object:
    for name in _REFUSED:
        if options.has(name):
            raise CommandError(f"--{name}: Intel RDT is not supported yet")
    if (path := options.text("resources")) == "-":
        return _load(sys.stdin.read(), "standard input")
    if path:
        with open(path, encoding="utf-8") as file:
            return _load(file.read(), path)
    wanted: dict[str, dict[str, object]] = {}
    for name, (part, member) in _NUMBERS.items():
        if options.has(name):
            wanted.setdefault(part, {})[member] = _number(name, options.text(name))
    for name, (part, member) in _TEXTS.items():
        if options.has(name):
            wanted.setdefault(part, {})[member] = options.text(name)
    return wanted


def _load(text: str, where: str) -> object:
    try:
        value: object = json.loads(text)
    except ValueError as e:
        raise CommandError(f"{where}: {e}") from None
    return value


def _number(name: str, text: str) -> int:
    """An integer, of bytes also with k, m, g or t behind it."""
    body, shift = text.strip(), 0
    if name.startswith("memory") and body[-1:].lower() == "b":
        body = body[:-1]
    if name.startswith("memory") and body[-1:].lower() in _SUFFIXES:
        body, shift = body[:-1], _SUFFIXES[body[-1].lower()]
    try:
        number = int(body)
    except ValueError:
        raise CommandError(f"--{name}: {text!r} is not a number") from None
    return number << shift if number > 0 else number
