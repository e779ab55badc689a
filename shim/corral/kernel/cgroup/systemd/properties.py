"""Limits as properties of a unit.

What a limit comes to is worked out once, by the planners of the driver (corral.kernel.cgroup.plans), and what the
kernel makes of it is in the files that they write: those are translated here. A file that has no property is the
driver's alone: systemd leaves it as it is.

Source: systemd.resource-control(5), org.freedesktop.systemd1(5); runc docs/systemd.md "Resource limits" for which of
them a runtime sets.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from corral.kernel.cgroup import convert, files
from corral.kernel.cgroup.device_rules import Node, fold
from corral.kernel.cgroup.resources import DeviceRule
from corral.kernel.cgroup.steps import Step, Write
from corral.kernel.dbus.marshalling import Variant

type Property = tuple[str, Variant]

INFINITY = 2**64 - 1
_SECOND_US, _PERCENT_US, _DEFAULT_PERIOD_US = 1_000_000, 10_000, 100_000

_SINCE = {"CPUQuotaPeriodUSec": 242, "AllowedCPUs": 244, "AllowedMemoryNodes": 244, "OOMPolicy": 253}
"""The version of systemd that knows a property first; an older one is not told."""
_IDLE_SINCE = 252

_CPU_MAX, _CPU_WEIGHT, _CPU_IDLE = "cpu.max", "cpu.weight", "cpu.idle"
_V1_QUOTA, _V1_PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


def _limit(name: str) -> Callable[[str], list[Property]]:
    return lambda value: [(name, Variant("t", _count(value)))]


def _count(value: str) -> int:
    number = files.number(value)
    return INFINITY if number < 0 else number


def _tasks(value: str) -> list[Property]:
    return [("TasksMax", Variant("t", _count(value) or 1))]  # which may not be 0


def _list(name: str) -> Callable[[str], list[Property]]:
    return lambda value: [(name, Variant("ay", bitmap(value)))]


def _bandwidth(value: str) -> list[Property]:
    quota, period = (*value.split(), "")[:2]
    return _quota(-1 if quota == "max" else int(quota), int(period or _DEFAULT_PERIOD_US))


def _quota(quota_us: int, period_us: int) -> list[Property]:
    per_second = INFINITY if quota_us < 0 else _per_second(quota_us, period_us)
    return [("CPUQuotaPeriodUSec", Variant("t", period_us)), ("CPUQuotaPerSecUSec", Variant("t", per_second))]


def _per_second(quota_us: int, period_us: int) -> int:
    """systemd keeps whole percents, so the quota is rounded up to one."""
    return -(-quota_us * _SECOND_US // (period_us * _PERCENT_US)) * _PERCENT_US


def _weight(name: str, converted: Callable[[int], int] = int) -> Callable[[str], list[Property]]:
    """Of a file that has a line of its own for all devices without one, "100" or "default 100", the first."""
    return lambda value: [(name, Variant("t", converted(int(value.splitlines()[0].split()[-1]))))]


_OF_FILE: dict[str, Callable[[str], list[Property]]] = {
    # v2
    "memory.max": _limit("MemoryMax"),
    "memory.high": _limit("MemoryHigh"),
    "memory.low": _limit("MemoryLow"),
    "memory.min": _limit("MemoryMin"),
    "memory.swap.max": _limit("MemorySwapMax"),
    _CPU_MAX: _bandwidth,
    _CPU_WEIGHT: _limit("CPUWeight"),
    _CPU_IDLE: lambda _: [],  # see below
    "io.weight": _weight("IOWeight"),
    "io.bfq.weight": _weight("IOWeight", convert.io_weight),
    # both
    "pids.max": _tasks,
    "cpuset.cpus": _list("AllowedCPUs"),
    "cpuset.mems": _list("AllowedMemoryNodes"),
    # v1
    "memory.limit_in_bytes": _limit("MemoryLimit"),
    "cpu.shares": _limit("CPUShares"),
    _V1_QUOTA: lambda _: [],  # likewise
    _V1_PERIOD: lambda _: [],
    "blkio.weight": _weight("BlockIOWeight"),
    "blkio.bfq.weight": _weight("BlockIOWeight"),
}


def contents_of(steps: Iterable[Step]) -> dict[str, str]:
    """The files, by name, that the steps have written and that say something to systemd."""
    paths = {step.path for step in steps if isinstance(step, Write)}
    for path in list(paths):
        directory, _, name = path.rpartition("/")
        if name in (_V1_QUOTA, _V1_PERIOD):  # systemd wants both
            paths |= {f"{directory}/{_V1_QUOTA}", f"{directory}/{_V1_PERIOD}"}
    names = {path: path.rpartition("/")[2] for path in paths}
    return {name: files.read(path) for path, name in names.items() if name in _OF_FILE}


def properties_of(contents: Mapping[str, str], version: int) -> list[Property]:
    """What a systemd of some version is to be told of the files, by name, that hold limits. Pure."""
    found: dict[str, Variant] = {}
    for name, value in contents.items():
        found |= _OF_FILE[name](value)
    if contents.get(_CPU_IDLE) == "1":
        for weight in ("CPUWeight", "CPUShares"):  # the file tells of idling, and refuses what it tells
            found.pop(weight, None)
        if version >= _IDLE_SINCE:
            found["CPUWeight"] = Variant("t", 0)  # what can't be told is that it is not idle any more
    if quota := contents.get(_V1_QUOTA):
        found |= _quota(int(quota), int(contents[_V1_PERIOD]))
    return [(name, value) for name, value in found.items() if version >= _SINCE.get(name, 0)]


def oom_policy(value: str, version: int) -> list[Property]:
    """memory.oom.group, which systemd takes only when it makes a unit."""
    policy = {"0": "continue", "1": "kill"}.get(value)
    return [("OOMPolicy", Variant("s", policy))] if policy and version >= _SINCE["OOMPolicy"] else []


def in_whole_percents(steps: Sequence[Step]) -> list[Step]:
    """The steps, with a quota of CPU time as systemd will write it."""
    return [_in_whole_percents(step) if isinstance(step, Write) else step for step in steps]


def _in_whole_percents(step: Write) -> Write:
    directory, _, name = step.path.rpartition("/")
    try:
        if name == _CPU_MAX and not step.value.startswith("max"):
            quota, period = (*step.value.split(), str(_DEFAULT_PERIOD_US))[:2]
            return replace(step, value=f"{_rounded(int(quota), int(period))} {period}")
        if name == _V1_QUOTA and int(step.value) > 0:
            return replace(step, value=str(_rounded(int(step.value), files.read_number(f"{directory}/{_V1_PERIOD}"))))
    except (ValueError, ZeroDivisionError):
        pass  # the kernel says what is wrong with it
    return step


def _rounded(quota_us: int, period_us: int) -> int:
    return _per_second(quota_us, period_us) * period_us // _SECOND_US


def bitmap(numbers: str) -> bytes:
    """A list of CPUs or memory nodes as bits, the first in the lowest bit of the first byte. Raises ValueError.

    >>> bitmap("0-2,9")
    b'\\x07\\x02'
    """
    bits = 0
    for part in filter(None, (part.strip() for part in numbers.split(","))):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"{part!r} is not a range")
        bits |= (1 << high + 1) - (1 << low)
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def device_properties(rules: Sequence[DeviceRule]) -> list[Property]:
    """Which devices may be used, for v1, where systemd would allow all of them again.

    What it has no words for, a rule for one minor number of any major, and an allowance with exceptions, it denies;
    the driver's own rules, which are written after, allow it.
    """
    access = fold(rules)
    if access.allowed and not access.exceptions:
        return [("DeviceAllow", Variant("a(ss)", [])), ("DevicePolicy", Variant("s", "auto"))]
    allowed = [] if access.allowed else [_allowance(node, bits) for node, bits in access.exceptions.items()]
    return [
        ("DevicePolicy", Variant("s", "strict")),
        ("DeviceAllow", Variant("a(ss)", [])),  # of an existing unit: none of those before
        ("DeviceAllow", Variant("a(ss)", [each for each in allowed if each is not None])),
    ]


def _allowance(node: Node, bits: frozenset[str]) -> tuple[str, str] | None:
    kind = {"b": "block", "c": "char"}[node.type]
    access = "".join(bit for bit in "rwm" if bit in bits)
    if node.major == "*":
        return (f"{kind}-*", access) if node.minor == "*" else None
    return (f"{kind}-{node.major}" if node.minor == "*" else f"/dev/{kind}/{node.major}:{node.minor}", access)
