"""Containers that take all they can get: processes, memory, file descriptors."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from support.corrald import Corrald

PIDS_LIMIT = 60
FD_LIMIT = 128

# Name, its options, its program. awk does not mind a fork or an open that fails, where a shell would end.
HOGS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "fork-bomb": (("--pids-limit", str(PIDS_LIMIT)), 'BEGIN { while (1) system("b() { b | b & sleep 1; }; b") }'),
    "memory-hog": (
        ("--memory", "16m", "--memory-swap", "16m"),
        'BEGIN { while (1) system("exec tail /dev/zero") }',
    ),
    "fd-hog": (
        ("--ulimit", f"nofile={FD_LIMIT}"),
        'BEGIN { path = "/dev/null"; while ((getline < path) == 0) path = "/" path; system("sleep 1000") }',
    ),
}


@contextlib.contextmanager
def run_hogs(daemon: Corrald) -> Iterator[Mapping[str, str]]:
    """All of them, on half a CPU each; their ids by name."""
    try:
        yield {name: _run(daemon, name, *options, program=program) for name, (options, program) in HOGS.items()}
    finally:
        daemon.corral("rm", "--force", *HOGS)


def _run(daemon: Corrald, name: str, *options: str, program: str) -> str:
    words = ("run", "--detach", "--name", name, "--network", "none", "--cpus", "0.5", *options)
    result = daemon.corral(*words, "busybox", "awk", program)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode().strip()


def open_files(pid: int) -> int:
    """How many descriptors a process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
