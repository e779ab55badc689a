"""Which processes belong to a container: those in its cgroups, or else those in its pid namespace. Blocks."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.kernel.process import start_time
from corral.tasks.identity import Identity
from corral.tasks.model import ProcessRow, Status


def pids(cgroup_paths: Sequence[str], init: ProcessRow) -> list[int]:
    """The pids of a running container, as the host counts them; empty when it does not run."""
    if init.status is Status.STOPPED or not Identity(init.pid, init.start_time).lives:
        return []
    if cgroup_paths:
        return sorted(set(_in_cgroup(cgroup_paths[0])))
    return sorted(_in_namespace_of(init.pid))


def members(cgroup_paths: Sequence[str]) -> list[Identity]:
    """Every process in these cgroups and in those below them, never this one."""
    found = {pid for path in cgroup_paths for pid in _in_cgroup(path)} - {0, 1, os.getpid()}
    return [identity for pid in sorted(found) if (identity := _identity(pid)) is not None]


def _in_cgroup(path: str) -> Iterator[int]:
    for directory, _, files in os.walk(path):
        if "cgroup.procs" not in files:
            continue
        try:
            text = Path(directory, "cgroup.procs").read_text()
        except OSError:  # it was removed meanwhile, or is a threaded one, whose processes its parent lists
            continue
        yield from map(int, text.split())


def _in_namespace_of(pid: int) -> Iterator[int]:
    """The namespace and those below it are not told apart: a container's own containers are its processes."""
    try:
        namespace = Path(f"/proc/{pid}/ns/pid").readlink()
    except OSError:
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "ns/pid").readlink() == namespace:
                    yield int(entry.name)
            except OSError:  # it has ended
                continue


def _identity(pid: int) -> Identity | None:
    try:
        return Identity(pid, start_time(pid))
    except (FileNotFoundError, ProcessLookupError):
        return None
