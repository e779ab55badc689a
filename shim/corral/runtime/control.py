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
_IGNORED = ("kernel-memory", "kernel-memory-tcp")
UPDATE_FLAGS: Flags = {"resources,r": VALUE} | dict.fromkeys([*_NUMBERS, *_TEXTS, *_REFUSED, *_IGNORED], VALUE)
_SUFFIXES = {"k": 10, "m": 20, "g": 30, "t": 40, "p": 50}


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
    if any(options.has(name) for name in _IGNORED):
        context.log.warning("limits of kernel memory are ignored: kernels have none any more")
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
        if text := options.text(name):
            wanted.setdefault(part, {})[member] = _number(name, text)
    for name, (part, member) in _TEXTS.items():
        if text := options.text(name):
            wanted.setdefault(part, {})[member] = text
    return wanted


def _load(text: str, where: str) -> object:
    try:
        value: object = json.loads(text)
    except ValueError as e:
        raise CommandError(f"{where}: {e}") from None
    return {} if value is None else value


def _number(name: str, text: str) -> int:
    """An integer; of bytes also 1.5g, 64 MiB and the like."""
    try:
        return _size(text) if name.startswith("memory") else int(text)
    except ValueError:
        raise CommandError(f"--{name}: {text!r} is not a number") from None


def _size(text: str) -> int:
    """Bytes with a unit or without, or -1, as Docker's go-units reads them. Raises ValueError."""
    if text == "-1":
        return -1
    body, shift = text.strip().lower().removesuffix("b"), 0
    if body[-2:-1] in _SUFFIXES:
        body = body.removesuffix("i")
    if body[-1:] in _SUFFIXES:
        body, shift = body[:-1], _SUFFIXES[body[-1]]
    whole, point, part = body.rstrip().partition(".")
    if not (body.isascii() and whole.isdecimal() and part.isdecimal() == bool(point)):
        raise ValueError(text)
    return int(float(f"{whole}.{part}") * (1 << shift)) if point else int(whole) << shift
