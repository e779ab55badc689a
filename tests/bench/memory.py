"""Memory of processes as the kernel counts it. Source: proc(5), /proc/pid/smaps_rollup."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support.corrald import Corrald
from support.sweep import shims


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `pss` shares out each page among those that map it; `rss` counts it in full."""

    pss: int
    rss: int

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.pss + other.pss, self.rss + other.rss)


def of_processes(pids: Iterable[int]) -> Memory:
    total = Memory(0, 0)
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        fields = {key: int(value.split()[0]) * 1024 for key, value in (line.split(":") for line in lines)}
        total += Memory(fields["Pss"], fields["Rss"])
    return total


def of_daemon(daemon: Corrald) -> Memory:
    return of_processes(p.pid for p in daemon.processes.values())


def of_shims(daemon: Corrald) -> Memory:
    """Shims and their zygote: everything of ours but the daemon itself."""
    return of_processes(shims(daemon.state))


def of_commands(*names: str) -> Memory:
    """Every process whose command is one of these."""
    return of_processes(pids_of(*names))


def pids_of(*names: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "comm").read_text().strip()
            except OSError:
                continue
            if command in names:
                found.append(int(entry.name))
    return found
