"""Settings of the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`addresses` says where each leaf is reached; they may all be equal."""

    root: Path
    state: Path
    addresses: Mapping[str, str]
    # Between the stop signal and SIGKILL, where neither the container nor the call says otherwise.
    stop_timeout_s: float = 10.0
    # Events kept in the merged journal.
    journal_keep: int = 100_000
