"""Requests as values: what arrived is checked once, here, and refused with the name of the field that is wrong.

Fields that this version does not know are ignored, so an older shim works under a newer daemon.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from corral.oci.spec import Mount
from corral.shim.errors import ShimError

type Fields = Mapping[str, object]

_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
DEFAULT_LOG_SIZE = 16 << 20
DEFAULT_LOG_FILES = 5
STDIN, CONSOLE = "stdin", "console"
STREAM_NAMES = (STDIN, "stdout", "stderr", CONSOLE)


def _wrong(name: str, wanted: str) -> ShimError:
    return ShimError("invalid_argument", f"{name}: must be {wanted}")


def _value[T](fields: Fields, name: str, kind: type[T], wanted: str, default: T | None) -> T:
    value = fields.get(name)
    if value is None:
        if default is None:
            raise ShimError("invalid_argument", f"{name}: missing")
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(name, wanted)
    return value


def text(fields: Fields, name: str, default: str | None = None) -> str:
    """A string member; without a default it must be there."""
    value = _value(fields, name, str, "a string", default)
    if "\0" in value:
        raise _wrong(name, "a string without NUL")
    return value


def flag(fields: Fields, name: str) -> bool:
    """A boolean member, false if absent."""
    return _value(fields, name, bool, "true or false", False)


def integer(fields: Fields, name: str, default: int | None = None) -> int:
    """An integer member; without a default it must be there."""
    return _value(fields, name, int, "an integer", default)


def _object(fields: Fields, name: str) -> Fields:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(name, "an object")
    return value


def _list(fields: Fields, name: str) -> Sequence[object]:
    value = fields.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _wrong(name, "an array")
    return value


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    return tuple(text({name: item}, name) for item in _list(fields, name))


def exec_id(fields: Fields) -> str:
    """Which process is meant: "" is the container's own, else the id of an exec."""
    value = text(fields, "exec", "")
    if value and not _ID.fullmatch(value):
        raise _wrong("exec", f"an id ({_ID.pattern})")
    return value


def size(width: int, height: int, name: str) -> tuple[int, int]:
    """Columns and rows of a terminal."""
    if not (0 <= width < 1 << 16 and 0 <= height < 1 << 16):
        raise _wrong(name, "columns and rows below 65536")
    return width, height


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Where output is kept. max_size 0 is no limit; max_files counts the current one."""

    driver: str
    path: str = ""
    max_size: int = DEFAULT_LOG_SIZE
    max_files: int = DEFAULT_LOG_FILES

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """From the "log" member of create; without one, nothing is kept."""
        driver = text(fields, "driver", "none")
        if driver not in ("json-file", "cri", "none"):
            raise _wrong("log.driver", "json-file, cri or none")
        path = text(fields, "path", "")
        if driver != "none" and not path.startswith("/"):
            raise _wrong("log.path", "an absolute path")
        max_size = integer(fields, "max_size", DEFAULT_LOG_SIZE)
        max_files = integer(fields, "max_files", DEFAULT_LOG_FILES)
        if max_size < 0 or not 0 <= max_files <= 1000:
            raise _wrong("log", "limits: max_size of 0 or more bytes, max_files of 1 to 1000")
        return cls(driver, path, max_size, max_files or DEFAULT_LOG_FILES)


@dataclass(frozen=True, slots=True)
class Create:
    """Make the container of the bundle's config.json, up to the point where only its program is missing."""

    rootfs: tuple[Mount, ...]
    parts: tuple[Mount, ...]
    """What the first one is put together from (corral.oci.parts)."""
    user: str | None
    stdin: bool
    console_size: tuple[int, int] | None
    log: LogOptions
    cgroup_paths: tuple[Path, ...]

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        rootfs = _list(fields, "rootfs")
        first = rootfs[0] if rootfs and isinstance(rootfs[0], dict) else {}
        return cls(
            rootfs=tuple(_mount(item) for item in rootfs),
            parts=tuple(_mount(item) for item in _list(first, "parts")),
            user=text(fields, "user", "") or None,
            stdin=flag(fields, "stdin"),
            console_size=_console_size(fields),
            log=LogOptions.parse(_object(fields, "log")),
            cgroup_paths=tuple(Path(path) for path in _strings(_object(fields, "cgroup"), "paths")),
        )


def _mount(value: object) -> Mount:
    if not isinstance(value, dict):
        raise _wrong("rootfs", "an array of mounts")
    return Mount(type=text(value, "type"), source=text(value, "source", ""), options=_strings(value, "options"))


def _console_size(fields: Fields) -> tuple[int, int] | None:
    pair = _list(fields, "console_size")
    if not pair:
        return None
    if len(pair) != 2:
        raise _wrong("console_size", "[columns, rows]")
    width, height = (integer({"console_size": item}, "console_size") for item in pair)
    return size(width, height, "console_size")


@dataclass(frozen=True, slots=True)
class Exec:
    """Register one more process, an OCI process object, to be started in the container."""

    exec_id: str
    process: object
    user: str | None
    stdin: bool

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        name = exec_id(fields)
        if not name:
            raise ShimError("invalid_argument", "exec: missing")
        return cls(name, _object(fields, "process"), text(fields, "user", "") or None, flag(fields, "stdin"))


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take over a process whose shim was killed: the container's own first, then its execs.

    streams: what comes along as descriptors, in this order (corral.shim.stdio). terminal is for execs, log and
    cgroup_paths are for the container's own process.
    """

    exec_id: str
    pid: int
    start_time: int
    created_at_ns: int
    started_at_ns: int
    terminal: bool
    stdin: bool
    streams: tuple[str, ...]
    log: LogOptions
    cgroup_paths: tuple[Path, ...]

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        streams = _strings(fields, "streams")
        if len(set(streams)) < len(streams) or not set(streams) <= set(STREAM_NAMES):
            raise _wrong("streams", f"some of {', '.join(STREAM_NAMES)}")
        pid, start_time = integer(fields, "pid"), integer(fields, "start_time")
        if not 0 < pid < 1 << 31 or start_time < 0:
            raise _wrong("pid", "that of a process, with its start_time")
        return cls(
            exec_id=exec_id(fields),
            pid=pid,
            start_time=start_time,
            created_at_ns=integer(fields, "created_at_ns", 0),
            started_at_ns=integer(fields, "started_at_ns"),
            terminal=flag(fields, "terminal"),
            stdin=flag(fields, "stdin"),
            streams=streams,
            log=LogOptions.parse(_object(fields, "log")),
            cgroup_paths=tuple(Path(path) for path in _strings(_object(fields, "cgroup"), "paths")),
        )


@dataclass(frozen=True, slots=True)
class Attach:
    """Connect descriptors, sent along in the order stdin, stdout, stderr, to a process."""

    exec_id: str
    stdin: bool
    stdout: bool
    stderr: bool
    lossless: bool
    replay: bool
    stdin_once: bool

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        names = ("stdin", "stdout", "stderr", "lossless", "replay", "stdin_once")
        request = cls(exec_id(fields), *(flag(fields, name) for name in names))
        if not request.fd_count:
            raise ShimError("invalid_argument", "at least one of stdin, stdout and stderr must be attached")
        return request

    @property
    def fd_count(self) -> int:
        """How many descriptors come along."""
        return self.stdin + self.stdout + self.stderr
