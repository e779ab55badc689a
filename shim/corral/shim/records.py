"""Files of a bundle that outlive the shim: record.json, exit.json, execs/<id>.json."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from corral.kernel.failpoint import failpoint

RECORD = "record.json"
EXIT = "exit.json"
EXECS = "execs"
RUNS = "runs"
"""A directory with a file PID.START_TIME for each run that its shim's end may not end."""
STARTING = "starting"
"""There from before init is told to become its program: without it, it never was."""
UNATTENDED = "unattended"
"""There once a shim has found that the container ended while nobody held its output."""
VERSION = 1
BY_ZYGOTE = "its shim was killed before it could report the exit"
"""The reason in an exit that the zygote has written in a shim's place."""
UNSTARTED = "its shim was killed before its program was executed"
"""The same, of a container that never became its program."""
_READ_SIZE = 64 << 10

_to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Record:
    """What a later shim or daemon needs to find this container again."""

    shim_pid: int
    shim_start_time: int
    init_pid: int
    init_start_time: int
    created_at_ns: int
    started_at_ns: int | None
    terminal: bool
    oom_uncounted: int | None = None
    """How many OOM kills its cgroup had seen before it."""

    def to_json(self) -> dict[str, object]:
        """The content of record.json."""
        return {
            "v": VERSION,
            "shim_pid": self.shim_pid,
            "shim_start_time": self.shim_start_time,
            "init_pid": self.init_pid,
            "init_start_time": self.init_start_time,
            "created_at_ns": self.created_at_ns,
            "started_at_ns": self.started_at_ns,
            "terminal": self.terminal,
            "oom_uncounted": self.oom_uncounted,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> Self:
        """Raises ValueError if something is missing or is no number."""
        started_at_ns, oom_uncounted = content.get("started_at_ns"), content.get("oom_uncounted")
        return cls(
            shim_pid=_number(content, "shim_pid"),
            shim_start_time=_number(content, "shim_start_time"),
            init_pid=_number(content, "init_pid"),
            init_start_time=_number(content, "init_start_time"),
            created_at_ns=_number(content, "created_at_ns"),
            started_at_ns=started_at_ns if isinstance(started_at_ns, int) else None,
            terminal=content.get("terminal") is True,
            oom_uncounted=oom_uncounted if isinstance(oom_uncounted, int) else None,
        )


def _number(content: Mapping[str, object], name: str) -> int:
    value = content.get(name)
    if not isinstance(value, int):
        raise ValueError(f"{RECORD}: {name} is {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. `code` is 0 to 255, 128 + signal when a signal ended it."""

    exec_id: str
    code: int
    signal: int | None
    oom: bool
    started_at_ns: int | None
    exited_at_ns: int
    pid: int
    start_time: int
    dropped_bytes: int = 0
    reason: str = ""
    known: bool = True
    """False if nobody saw it: then code is 255."""
    timed_out: bool = False

    def to_json(self) -> dict[str, object]:
        """The content of exit.json, and of the event that follows it."""
        return {
            "v": VERSION,
            "exec": self.exec_id,
            "code": self.code,
            "signal": self.signal,
            "oom": self.oom,
            "started_at_ns": self.started_at_ns,
            "exited_at_ns": self.exited_at_ns,
            "pid": self.pid,
            "start_time": self.start_time,
            "dropped_bytes": self.dropped_bytes,
            "reason": self.reason,
            "known": self.known,
            "timed_out": self.timed_out,
        }


def write_json(
    directory: int, name: str, content: Mapping[str, object], *, step: str, durable: bool = True, replace: bool = True
) -> None:
    """Make `name` in the directory (an fd) hold exactly this: a reader sees the old or the new content.

    durable: also after a power loss; not needed for what only tells of living processes. step names the failpoints.
    Raises OSError; then the old content stands. So it does with FileExistsError, if it is there and is not to be
    replaced, for a writer that is not the only one.
    """
    temporary = f"{name}.tmp" if replace else f"{name}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        try:
            _write_all(fd, _to_json(content).encode())
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        failpoint(f"{step}.before_rename")
        if not replace:
            os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            os.unlink(temporary, dir_fd=directory)
        else:
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise
    if durable:
        _fsync_directory(directory, os.fspath(Path(name).parent))
    failpoint(f"{step}.after_rename")


def _fsync_directory(directory: int, name: str) -> None:
    # The bundle is held by an O_PATH descriptor, which cannot be synced itself.
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def exit_file(exec_id: str) -> str:
    """Where the exit of a process is written, "" being the container's own."""
    return f"{EXECS}/{exec_id}.json" if exec_id else EXIT


def exists(directory: int, name: str) -> bool:
    """Whether the directory has such a file."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def remove(directory: int, name: str) -> None:
    """Remove a file of the directory, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def read_json(directory: int, name: str) -> dict[str, object]:
    """The JSON object in a file of the directory. Raises OSError, ValueError."""
    content = json.loads(read_text(directory, name))
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    return content


def read_text(directory: int, name: str) -> str:
    """What is in a file of the directory. Raises OSError, ValueError."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        parts = []
        while part := os.read(fd, _READ_SIZE):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts).decode()
