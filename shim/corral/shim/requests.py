"""Requests as values: what arrived is checked once, here, and refused with the name of the field that is wrong.

Fields that this version does not know are ignored, so an older shim works under a newer daemon.
"""

import binascii
import os
import re
from dataclasses import dataclass, field
from typing import Self

from corral.oci.image_mounts import ImageMount
from corral.oci.secret_files import SecretFile
from corral.oci.spec import Mount
from corral.shim.errors import ShimError
from corral.shim.fields import Fields, array, flag, integer, mapping, strings, text, wrong
from corral.shim.log_options import LogOptions
from corral.shim.log_program import LIFE, PROGRAM
from corral.shim.spool import STREAMS

_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
STDIN, CONSOLE, PIDFD = "stdin", "console", "pidfd"
LOG_PREFIX = "log."
"""Streams of what the log goes to."""
_OF_LOG = tuple(f"{LOG_PREFIX}{name}" for name in (*STREAMS, LIFE, PROGRAM))
STREAM_NAMES = (STDIN, *STREAMS, CONSOLE, PIDFD, *_OF_LOG)
MOST_OUTPUT = 64 << 10
"""That can be asked for of a process that is run."""


def exec_id(fields: Fields) -> str:
    """Which process is meant: "" is the container's own, else the id of an exec."""
    value = text(fields, "exec", "")
    if value and not _ID.fullmatch(value):
        raise wrong("exec", f"an id ({_ID.pattern})")
    return value


def size(width: int, height: int, name: str) -> tuple[int, int]:
    """Columns and rows of a terminal."""
    if not (0 <= width < 1 << 16 and 0 <= height < 1 << 16):
        raise wrong(name, "columns and rows below 65536")
    return width, height


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
    cgroup_paths: tuple[str, ...]
    timeout_ns: int
    """From its start on; 0: it has time for ever."""
    secrets: tuple[SecretFile, ...] = field(default=(), repr=False)
    images: tuple[ImageMount, ...] = ()
    secret_env: tuple[str, ...] = field(default=(), repr=False)
    """Assignments; like the secrets in no file."""

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        rootfs = array(fields, "rootfs")
        first = rootfs[0] if rootfs and isinstance(rootfs[0], dict) else {}
        return cls(
            rootfs=tuple(_mount(item) for item in rootfs),
            parts=tuple(_mount(item) for item in array(first, "parts")),
            user=text(fields, "user", "") or None,
            stdin=flag(fields, "stdin"),
            console_size=_console_size(fields),
            log=LogOptions.parse(mapping(fields, "log")),
            cgroup_paths=_cgroup_paths(fields),
            timeout_ns=_timeout(fields),
            secrets=tuple(_secret(item) for item in array(fields, "secrets")),
            images=tuple(_image(item) for item in array(fields, "images")),
            secret_env=strings(fields, "secret_env"),
        )


def _image(value: object) -> ImageMount:
    if not isinstance(value, dict):
        raise wrong("images", "an array of objects")
    target, tree = text(value, "target"), _mount(mapping(value, "tree"))
    if not target.startswith("/"):
        raise wrong("images.target", "an absolute path")
    subpath, writable = text(value, "subpath", ""), flag(value, "writable")
    try:
        return ImageMount.of(target, tree, subpath=subpath, writable=writable)
    except ValueError as e:
        raise ShimError("invalid_argument", f"images.tree: {e}") from e


def _secret(value: object) -> SecretFile:
    if not isinstance(value, dict):
        raise wrong("secrets", "an array of objects")
    target, uid, gid, mode = text(value, "target"), integer(value, "uid"), integer(value, "gid"), integer(value, "mode")
    if not target.startswith("/") or not all(0 <= each < 1 << 32 for each in (uid, gid)) or not 0 <= mode <= 0o7777:
        raise wrong("secrets", "files with an absolute target, a uid, a gid and a mode")
    try:
        data = binascii.a2b_base64(text(value, "data"))
    except ValueError as e:
        raise wrong("secrets.data", "base64") from e
    return SecretFile(target, uid, gid, mode, data)


def _cgroup_paths(fields: Fields) -> tuple[str, ...]:
    return tuple(os.path.normpath(path) for path in strings(mapping(fields, "cgroup"), "paths"))


def _timeout(fields: Fields) -> int:
    timeout_ns = integer(fields, "timeout_ns", 0)
    if timeout_ns < 0:
        raise wrong("timeout_ns", "0 or more")
    return timeout_ns


def _mount(value: object) -> Mount:
    if not isinstance(value, dict):
        raise wrong("rootfs", "an array of mounts")
    return Mount(type=text(value, "type"), source=text(value, "source", ""), options=strings(value, "options"))


def _console_size(fields: Fields) -> tuple[int, int] | None:
    pair = array(fields, "console_size")
    if not pair:
        return None
    if len(pair) != 2:
        raise wrong("console_size", "[columns, rows]")
    width, height = (integer({"console_size": item}, "console_size") for item in pair)
    return size(width, height, "console_size")


@dataclass(frozen=True, slots=True)
class Exec:
    """Register one more process, an OCI process object, to be started in the container.

    start: at once, and attach, if that is wanted, connects a client before.
    """

    exec_id: str
    process: object
    user: str | None
    stdin: bool
    start: bool
    attach: "Attach | None"

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        name = exec_id(fields)
        if not name:
            raise ShimError("invalid_argument", "exec: missing")
        start, attach = flag(fields, "start"), mapping(fields, "attach")
        attached = start and any(map(attach.get, (STDIN, *STREAMS)))
        return cls(
            exec_id=name,
            process=mapping(fields, "process"),
            user=text(fields, "user", "") or None,
            stdin=flag(fields, "stdin"),
            start=start,
            attach=Attach.parse({**attach, "exec": name}) if attached else None,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """Run one more process to its end, and tell nobody else of it: for what is asked of a container time and again.

    timeout_ns: from its start on; then it is killed. output_bytes: how much of the beginning of its output is wanted.
    """

    exec_id: str
    process: object
    user: str | None
    timeout_ns: int
    output_bytes: int

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        one = Exec.parse(fields)
        wanted = integer(fields, "output_bytes", 0)
        if not 0 <= wanted <= MOST_OUTPUT:
            raise wrong("output_bytes", f"between 0 and {MOST_OUTPUT}")
        return cls(one.exec_id, one.process, one.user, _timeout(fields), wanted)


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take over a process whose shim was killed: the container's own first, then its execs.

    streams: what comes along as descriptors, in this order (corral.shim.stdio), the process's pidfd among them. One
    that has no name of STREAM_NAMES is closed.
    unattended: nobody has held its output meanwhile. terminal is for execs; log, cgroup_paths and timeout_ns are for
    the container's own process.
    """

    exec_id: str
    pid: int
    start_time: int
    created_at_ns: int
    started_at_ns: int
    terminal: bool
    stdin: bool
    streams: tuple[str, ...]
    unattended: bool
    log: LogOptions
    cgroup_paths: tuple[str, ...]
    timeout_ns: int

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        streams = strings(fields, "streams")
        if len(set(streams)) < len(streams):
            raise wrong("streams", f"some of {', '.join(STREAM_NAMES)}")
        pid, start_time = integer(fields, "pid"), integer(fields, "start_time")
        if not 0 < pid < 1 << 31 or start_time < 0:
            raise wrong("pid", "that of a process, with its start_time")
        return cls(
            exec_id=exec_id(fields),
            pid=pid,
            start_time=start_time,
            created_at_ns=integer(fields, "created_at_ns", 0),
            started_at_ns=integer(fields, "started_at_ns"),
            terminal=flag(fields, "terminal"),
            stdin=flag(fields, "stdin"),
            streams=streams,
            unattended=flag(fields, "unattended"),
            log=LogOptions.parse(mapping(fields, "log")),
            cgroup_paths=_cgroup_paths(fields),
            timeout_ns=_timeout(fields),
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
