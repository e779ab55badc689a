"""Settings of the cgroups leaf; the section [cgroups] of config.toml has the same names."""

from dataclasses import dataclass
from pathlib import Path

from corral.cgroups.engine_limits import EngineLimits
from corral.kernel.cgroup.systemd.names import slice_path

SYSTEMD = "systemd"
PARENTS = {"cgroupfs": "/corral", SYSTEMD: "corral.slice"}
"""Who makes cgroups, and their parent, where the settings do not name one."""


@dataclass(frozen=True, slots=True)
class CgroupsConfig:
    """Where cgroups keeps its things, and where its cgroups are."""

    # Database; what must survive a restart.
    root: Path = Path("/var/lib/corral/cgroups")
    state: Path = Path("/run/corral")
    # Who makes the cgroups: "cgroupfs", this service itself, or "systemd", of which each is then a scope.
    driver: str = "cgroupfs"
    # Below it lies <namespace>/<id> in every hierarchy; with the driver systemd it is a slice, and there lie scopes,
    # see corral.cgroups.parent. Two engines on one host need different ones: what is found there at the start and has
    # no row is removed. The second does not start. Empty: /corral, or corral.slice.
    parent: str = ""
    # What all containers below the parent may use together; 0: no limit. Swap is not counted.
    memory_bytes: int = 0
    cpus: float = 0.0
    pids: int = 0
    # How long killed processes may take to go, and running ones to freeze.
    remove_timeout_s: float = 10.0
    freeze_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        """Raises ValueError."""
        self.limits()
        if self.driver not in PARENTS:
            raise ValueError(f"driver must be one of {', '.join(PARENTS)}, and is {self.driver!r}")
        if self.driver == SYSTEMD and self.parent:
            slice_path(self.parent)

    def parent_path(self) -> str:
        """The path of the parent below the hierarchies' roots."""
        parent = self.parent or PARENTS[self.driver]
        return slice_path(parent) if self.driver == SYSTEMD else parent

    def limits(self) -> EngineLimits:
        """What holds for all containers together. Raises ValueError."""
        return EngineLimits(self.memory_bytes, self.cpus, self.pids)
