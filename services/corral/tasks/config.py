"""Settings of the tasks leaf; the section [tasks] of config.toml has the same names."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TasksConfig:
    """Where tasks keeps its things, and its limits."""

    # Database and logs; what must survive a reboot.
    root: Path = Path("/var/lib/corral/tasks")
    # Bundles are made in its directory `shim`; run state.
    state: Path = Path("/run/corral")
    # Rotation of logs whose creator did not say.
    log_max_size_bytes: int = 16 << 20
    log_max_files: int = 4
    # Where systemd's journal listens, for the log driver journald.
    journal_socket: Path = Path("/run/systemd/journal/socket")
    # Containers set up at once; more wait their turn. 0: four per CPU.
    parallel_creates: int = 0
    # A shim that does not answer within this is given up.
    shim_timeout_s: float = 30.0
