"""Where a container's output is kept or sent, as create and adopt say it.

    {"driver": "json-file" | "cri", "path": FILE, "max_size": BYTES, "max_files": COUNT, "attrs": {NAME: VALUE}}
    {"driver": "syslog", "to": {"kind": …, "path" | "host" and "port": …, "facility": …, "form": …, "tag": …, …}}
    {"driver": "journald", "to": {"socket": PATH, "fields": {NAME: VALUE}}}
    {"driver": "binary", "to": {"args": [PROGRAM, …], "env": {NAME: VALUE}}}

Those that send keep a json-file at `path`, if there is one, to be read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from corral.shim.fields import Fields, integer, mapping, strings, text, wrong
from corral.shim.sending import DEFAULT_LIMIT
from corral.shim.syslog import FACILITIES, FORMATS, KINDS, Address

DEFAULT_LOG_SIZE = 16 << 20
DEFAULT_LOG_FILES = 5
KEEPING = ("json-file", "cri")


def _texts(fields: Fields, name: str) -> Mapping[str, str]:
    members = mapping(fields, name)
    return {key: text(members, key) for key in members}


@dataclass(frozen=True, slots=True)
class ToSyslog:
    """A syslog server, and what each message says of its sender."""

    address: Address
    facility: int
    form: str
    tag: str
    hostname: str

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        kind, path = text(fields, "kind"), text(fields, "path", "")
        host, port = text(fields, "host", ""), integer(fields, "port", 0)
        facility, form = integer(fields, "facility", FACILITIES.index("daemon")), text(fields, "form", "")
        if kind not in KINDS or not 0 <= facility < len(FACILITIES) or form not in FORMATS:
            raise wrong("log.to", f"a server of kind {', '.join(KINDS)}, a facility and a format that there are")
        if kind.startswith("unix") != path.startswith("/") or not 0 <= port < 1 << 16:
            raise wrong("log.to", "an absolute path, or a host and a port")
        address = Address(kind, path, host, port)
        return cls(address, facility, form, text(fields, "tag", ""), text(fields, "hostname", "-"))


@dataclass(frozen=True, slots=True)
class ToJournal:
    """The journal's socket, and fields that every entry has."""

    socket: str
    fields: Mapping[str, str]

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        return cls(text(fields, "socket"), _texts(fields, "fields"))


@dataclass(frozen=True, slots=True)
class ToProgram:
    """A program of the host, with its arguments, and all of its environment."""

    args: tuple[str, ...]
    env: Mapping[str, str]

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Raises ShimError(invalid_argument)."""
        args = strings(fields, "args")
        if not args or not args[0].startswith("/"):
            raise wrong("log.to.args", "an absolute path and arguments")
        return cls(args, _texts(fields, "env"))


type Destination = ToSyslog | ToJournal | ToProgram
_DESTINATIONS: Mapping[str, type[Destination]] = {"syslog": ToSyslog, "journald": ToJournal, "binary": ToProgram}
DRIVERS = (*KEEPING, "none", *_DESTINATIONS)


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Where output is kept or sent. max_size 0 is no limit; max_files counts the current one.

    buffer_size: bytes that may wait to be sent.
    """

    driver: str
    path: str = ""
    max_size: int = DEFAULT_LOG_SIZE
    max_files: int = DEFAULT_LOG_FILES
    attrs: Mapping[str, str] = field(default_factory=dict)
    to: Destination | None = None
    buffer_size: int = DEFAULT_LIMIT

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """From the "log" member of create; without one, nothing is kept."""
        driver = text(fields, "driver", "none")
        if driver not in DRIVERS:
            raise wrong("log.driver", f"one of {', '.join(DRIVERS)}")
        path = text(fields, "path", "")
        if (driver in KEEPING or path) and not path.startswith("/"):
            raise wrong("log.path", "an absolute path")
        max_size = integer(fields, "max_size", DEFAULT_LOG_SIZE)
        max_files = integer(fields, "max_files", DEFAULT_LOG_FILES)
        if max_size < 0 or not 0 <= max_files <= 1000:
            raise wrong("log", "limits: max_size of 0 or more bytes, max_files of 1 to 1000")
        to = _DESTINATIONS[driver].parse(mapping(fields, "to")) if driver in _DESTINATIONS else None
        size = integer(fields, "buffer_size", 0)
        return cls(
            driver,
            path,
            max_size,
            max_files or DEFAULT_LOG_FILES,
            _texts(fields, "attrs"),
            to,
            size if size > 0 else DEFAULT_LIMIT,
        )
