"""events."""

import contextlib
import select
import sys
import time
from typing import TYPE_CHECKING

from corral.kernel.cgroup import Cgroup, OomWatch, Stats, files
from corral.kernel.cgroup.files import UNLIMITED
from corral.runtime import life, state
from corral.runtime.context import Context
from corral.runtime.errors import CommandError
from corral.runtime.flags import SWITCH, VALUE, Flags, Options
from corral.runtime.show import print_json
from corral.runtime.state import Record

if TYPE_CHECKING:
    from corral.kernel.cgroup.systemd.removal import Kept

EVENTS_FLAGS: Flags = {"interval": VALUE, "stats": SWITCH}
_NO_LIMIT = 2**64 - 1
_LOOK_AGAIN_S, _HURRY_S = 0.05, 1.0
"""A v1 kernel wakes who watches before it kills, and not once more when it has."""
_LONGEST_WAIT_S = 86400.0
"""At a time: poll(2) counts milliseconds in an int."""
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def events(context: Context, options: Options, arguments: list[str]) -> int:
    """Print a reading of the counters; without --stats again and again, and each OOM kill, until the container ends."""
    interval_s = _seconds(options.text("interval", "5s"))
    with state.opened(context.root, arguments[0], lock=None) as place:
        record = place.record()
    if not life.init_lives(record):
        raise CommandError("container not running")
    group = life.needed_cgroup(record)
    if options.on("stats"):
        _print_stats(record, group)
        return 0
    _follow(record, group, interval_s)
    return 0


def _follow(record: Record, group: Cgroup, interval_s: float) -> None:
    pidfd = life.open_init(record)
    with OomWatch.open(group.directories) as oom, _kept(record, group, oom) as kept:
        seen = oom.count()
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(oom.fileno(), select.POLLIN)
        due = hurry_until = time.monotonic()
        while True:
            if time.monotonic() >= due:
                _print_stats(record, group)
                due += interval_s
            left_s = min(due - time.monotonic(), _LONGEST_WAIT_S if time.monotonic() > hurry_until else _LOOK_AGAIN_S)
            ready = dict(poller.poll(max(0.0, left_s) * 1000))
            if oom.fileno() in ready and oom.wakes_before_the_kill:
                hurry_until = time.monotonic() + _HURRY_S
                if kept is not None:
                    kept.keep_below(record.pid)
            count = oom.count()
            for _ in range(count - seen):
                _tell("oom", record)
            seen = count
            if pidfd in ready:
                return


def _kept(record: Record, group: Cgroup, oom: OomWatch) -> "contextlib.AbstractContextManager[Kept | None]":
    """Keep a scope's count from systemd, which removes it with the last process. See ...systemd.removal."""
    if record.unit and oom.wakes_before_the_kill:
        from corral.kernel.cgroup.systemd.removal import Kept

        with contextlib.suppress(OSError):  # another's: what there is time to read is told
            if kept := Kept.of(oom.directory, group.directories):
                return contextlib.closing(kept)
    return contextlib.nullcontext()


def _seconds(text: str) -> float:
    """A duration as Go writes it: 5s, 500ms, 1h30m."""
    found, left = 0.0, text
    while left:
        digits = left[: len(left) - len(left.lstrip("0123456789."))]
        left = left[len(digits) :]
        unit = left[: len(left) - len(left.lstrip("hmsnuµ"))]
        unit = next((known for known in _UNITS if unit.startswith(known)), "")
        left = left[len(unit) :]
        if not unit or not digits.replace(".", "", 1).isdecimal():
            break
        found += float(digits) * _UNITS[unit]
    else:
        if found > 0:
            return found
    raise CommandError(f"--interval: {text!r} is not a duration like 5s, 500ms or 1h30m, and greater than 0")


def _print_stats(record: Record, group: Cgroup) -> None:
    try:
        reading, raw = group.read(), _memory_stat(group)
    except OSError:
        if life.init_lives(record):
            raise
        return
    _tell("stats", record, data=data_of(reading, raw))


def _tell(kind: str, record: Record, **more: object) -> None:
    """Print an event, now: who reads it may be at the other end of a pipe."""
    print_json({"type": kind, "id": record.id} | more)
    sys.stdout.flush()


def _memory_stat(group: Cgroup) -> dict[str, int]:
    """The counters that clients know by the names that the kernel's version of cgroups has for them."""
    for directory in group.directories:
        with contextlib.suppress(FileNotFoundError):
            return files.flat_keyed(files.read(f"{directory}/memory.stat"))
    return {}


def data_of(stats: Stats, raw: dict[str, int]) -> dict[str, object]:
    """One reading in the members that runc has, and clients read. Source: runc types/events.go.

    raw: the memory controller's counters as they are.
    """
    data: dict[str, object] = {"cpu": {}, "memory": {}, "pids": {}, "blkio": {}, "hugetlb": {}, "intel_rdt": {}}
    if (cpu := stats.cpu) is not None:
        data["cpu"] = {
            "usage": {"total": cpu.usage_ns, "kernel": cpu.system_ns, "user": cpu.user_ns},
            "throttling": {
                "periods": cpu.periods,
                "throttledPeriods": cpu.throttled_periods,
                "throttledTime": cpu.throttled_ns,
            },
        }
    if (memory := stats.memory) is not None:
        limit = _NO_LIMIT if memory.limit_bytes == UNLIMITED else memory.limit_bytes
        usage = {"limit": limit, "usage": memory.usage_bytes, "max": memory.peak_bytes, "failcnt": memory.limit_hits}
        data["memory"] = {
            "cache": memory.file_bytes,
            "usage": usage,
            "swap": {  # with memory, whatever the version: as v1 counts it
                "limit": raw.get("hierarchical_memsw_limit", _NO_LIMIT),
                "usage": memory.usage_bytes + memory.swap_bytes,
                "max": 0,
                "failcnt": 0,
            },
            "kernel": {"limit": _NO_LIMIT, "usage": memory.kernel_bytes, "max": 0, "failcnt": 0},
            "raw": raw,
        }
    if (pids := stats.pids) is not None:
        data["pids"] = {"current": pids.current} | ({} if pids.limit == UNLIMITED else {"limit": pids.limit})
    data["blkio"] = {"ioServiceBytesRecursive": _io(stats, "bytes"), "ioServicedRecursive": _io(stats, "ops")}
    data["hugetlb"] = {
        each.page_size: {"usage": each.usage_bytes, "max": each.max_bytes, "failcnt": each.failures}
        for each in stats.hugetlb
    }
    return data


def _io(stats: Stats, what: str) -> list[dict[str, object]]:
    return [
        {"major": io.major, "minor": io.minor, "op": op, "value": getattr(io, f"{op.lower()}_{what}")}
        for io in stats.io
        for op in ("Read", "Write")
    ]
