"""What all containers may use together, so that the host survives them: limits of the parent of their cgroups.

They are settings, and made so at each start; the kernel keeps to them also while no daemon runs. A limit that is no
longer among the settings is lifted, if it was one of ours: its name is in an attribute of the cgroup, and goes with it.
A cgroup made elsewhere (a parent of the caller's choice) does not count.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from corral.api.cgroups.v1 import cgroups_pb2
from corral.cgroups.errors import translated
from corral.kernel.cgroup import UNLIMITED, CpuLimits, Driver, MemoryLimits, PidsLimits, Resources
from corral.kernel.cgroup.systemd.names import SCOPE
from corral.rpc.errors import CorralError, FailedPrecondition, InvalidArgument

log = structlog.get_logger()

PERIOD_US = 100_000
LEAST_CPUS = 0.01
"""A quota may not be shorter than a millisecond."""

MARK = "trusted.corral.limits"
_NONE = "-"

_HELD_UP = (InvalidArgument, FailedPrecondition)
"""EINVAL of a quota below that of a container, EBUSY of less memory than they have: v1 takes neither."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """0 is no limit."""

    memory_bytes: int = 0
    cpus: float = 0.0
    pids: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name, value in self.given().items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, and is {value}: 0 is no limit")
        if 0 < self.cpus < LEAST_CPUS:
            raise ValueError(f"cpus must be at least {LEAST_CPUS}, or 0 for no limit, and is {self.cpus}")

    def given(self) -> dict[str, float]:
        """Those that there are, by the names of their settings."""
        values = {"memory_bytes": self.memory_bytes, "cpus": self.cpus, "pids": self.pids}
        return {name: value for name, value in values.items() if value}

    def check(self, cpu: CpuLimits, driver: Driver, parent: str) -> None:
        """Raises InvalidArgument for CPU time that v1 refuses to a cgroup below the parent, since that has less.

        cpu: all that the cgroup is to have. v2 takes any, and so does v1 while ours is held up.
        """
        quota, period = cpu.quota_us, cpu.period_us or PERIOD_US
        hierarchy = driver.layout.of("cpu")
        if not self.cpus or quota is None or quota < 0 or hierarchy is None or hierarchy.version == 2:
            return
        all_cpus = driver.open(parent).cpus()
        if all_cpus is not None and quota / period > all_cpus:
            raise InvalidArgument(
                f"{quota / period:g} CPUs are more than all containers may use together, {all_cpus:g}: ask for less,"
                " or raise cpus in [cgroups]",
                reason="ABOVE_ENGINE_LIMIT",
            )


def enforce(driver: Driver, parent: str, limits: EngineLimits) -> None:
    """Make the parent's limits those given, and lift those that were given before.

    Raises CorralError, naming the setting, for one that this host cannot give. One that containers that run are above
    of, where the kernel does not take it then, is told in the log, and what was there stays.
    """
    given, ours = limits.given(), set(driver.marked(parent, MARK).split()) - {_NONE}
    for name in ours - given.keys():
        with translated(f"lift the limit [cgroups] {name}"):
            _lift(driver, parent, name)
        ours = ours - {name}
        _mark(driver, parent, ours)
    for name, value in given.items():
        _mark(driver, parent, ours | {name})  # first: should this process die now, it is still known whose limit it is
        try:
            if _limit(driver, parent, name, value):
                ours = ours | {name}
        finally:
            _mark(driver, parent, ours)


def _mark(driver: Driver, parent: str, names: Iterable[str]) -> None:
    driver.mark(parent, MARK, " ".join(sorted(names)) or _NONE)


def restore(driver: Driver, parent: str, limits: EngineLimits) -> None:
    """enforce(), where one that we set is not there: somebody removed the parent, and it was made again.

    It has a directory in each hierarchy, any of which may have been removed, so the mark of one does not tell.
    """
    given = limits.given()
    if not given:
        return
    mark = driver.marked(parent, MARK)
    ours = set(mark.split()) & given.keys() if mark else given.keys()
    if lost := sorted(name for name in ours if _is_unlimited(driver, parent, name)):
        log.warning("cgroups.engine_limits_lost", parent=parent, settings=lost)
        enforce(driver, parent, limits)


def _is_unlimited(driver: Driver, parent: str, name: str) -> bool:
    group = driver.open(parent)
    match name:
        case "memory_bytes":
            return group.memory_limit() == UNLIMITED
        case "cpus":
            return group.cpus() is None
        case _:
            return group.pids_limit() == UNLIMITED


def _lift(driver: Driver, parent: str, name: str) -> None:
    group = driver.open(parent)
    if name == "memory_bytes":
        group.lift_memory_limit()
    else:
        group.apply(_one(name, UNLIMITED))


def _limit(driver: Driver, parent: str, name: str, value: float) -> bool:
    """Whether it was set."""
    if name == "memory_bytes" and not _fits(driver, parent, int(value)):
        why = "containers use more, and this kernel would kill them for it"
        log.warning("cgroups.engine_limit_not_set", setting=name, value=value, reason=why)
        return False
    try:
        with translated(f"set [cgroups] {name} = {value:.12g}"):
            driver.open(parent).apply(_one(name, value))
    except CorralError as e:
        if not (isinstance(e, _HELD_UP) and _has_containers(driver, parent)):
            raise type(e)(f"{e}: change {name}, or leave it out", reason=e.reason) from e
        log.warning("cgroups.engine_limit_not_set", setting=name, value=value, reason=str(e))
        return False
    return True


def _fits(driver: Driver, parent: str, limit_bytes: int) -> bool:
    with translated("make room for [cgroups] memory_bytes"):
        return not _has_containers(driver, parent) or driver.open(parent).has_room_for_limit(limit_bytes)


def _has_containers(driver: Driver, parent: str) -> bool:
    """Scopes are containers, namespaces have some."""
    return any(name.endswith(SCOPE) or driver.list(f"{parent}/{name}") for name in driver.list(parent))


def _one(name: str, value: float) -> Resources:
    match name:
        case "memory_bytes":
            return Resources(memory=MemoryLimits(limit_bytes=int(value)))
        case "cpus":
            quota_us = UNLIMITED if value == UNLIMITED else round(value * PERIOD_US)
            return Resources(cpu=CpuLimits(quota_us=quota_us, period_us=PERIOD_US))
        case _:
            return Resources(pids=PidsLimits(int(value)))


def describe(driver: Driver, parent: str) -> cgroups_pb2.EngineLimits:
    """What the kernel has now; nothing of a parent that somebody has removed. Raises OSError."""
    group = driver.open(parent)
    if not group.exists():
        return cgroups_pb2.EngineLimits()
    reading = group.read()
    message = cgroups_pb2.EngineLimits(cpus=group.cpus() or 0)
    if reading.memory is not None:
        message.memory_bytes = max(0, reading.memory.limit_bytes)
        message.memory_usage_bytes = reading.memory.usage_bytes
    if reading.pids is not None:
        message.pids = max(0, reading.pids.limit)
        message.pids_current = reading.pids.current
    return message
