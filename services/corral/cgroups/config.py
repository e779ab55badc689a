"""Settings of the cgroups leaf; the section [cgroups] of config.toml has the same names."""

from dataclasses import dataclass
from pathlib import Path

from corral.cgroups.engine_limits import EngineLimits


@dataclass(frozen=True, slots=True)
class CgroupsConfig:
    """Where cgroups keeps its things, and where its cgroups are."""

    # Database; what must survive a restart.
    root: Path = Path("/var/lib/corral/cgroups")
    state: Path = Path("/run/corral")
    # Below it lies <namespace>/<id> in every hierarchy. Two engines on one host need different ones: what is found
    # there at the start and has no row is removed. The second does not start.
    parent: str = "/corral"
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

    def limits(self) -> EngineLimits:
        """What holds for all containers together. Raises ValueError."""
        return EngineLimits(self.memory_bytes, self.cpus, self.pids)
