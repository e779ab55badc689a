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
    # What of the merged journal is kept: so many of the newest events, no older than that, and no more than so many
    # bytes. Who asks for what is gone is told of the gap.
    journal_keep: int = 100_000
    journal_max_age_s: float = 2_592_000.0
    journal_max_bytes: int = 67_108_864
    # HOST:PORT at which Prometheus finds /metrics, for whoever reaches it. Empty: nowhere.
    metrics_address: str = ""
