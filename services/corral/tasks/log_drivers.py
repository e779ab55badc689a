"""Log drivers that send: from the words of docker to those of the shim.

What a container's log goes to is named by who makes it, and never by an image.
"""

import asyncio
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from corral.api.tasks.v1.tasks_pb2 import LogOptions, LogSubject
from corral.rpc.errors import FailedPrecondition, InvalidArgument, Unimplemented
from corral.shim.syslog import FACILITIES, FORMATS, KINDS
from corral.tasks.config import TasksConfig
from corral.tasks.model import TaskKey

DRIVERS = {
    LogOptions.DRIVER_UNSPECIFIED: "json-file",
    LogOptions.DRIVER_JSON_FILE: "json-file",
    LogOptions.DRIVER_CRI: "cri",
    LogOptions.DRIVER_NONE: "none",
    LogOptions.DRIVER_SYSLOG: "syslog",
    LogOptions.DRIVER_JOURNALD: "journald",
    LogOptions.DRIVER_BINARY: "binary",
}
SENDING = frozenset({"syslog", "journald", "binary"})
_COMMON = frozenset({"mode", "max-buffer-size"})
_OF_SENDING = _COMMON | {"cache-disabled"}
_KNOWN = {
    "json-file": _COMMON,
    "cri": _COMMON,
    "none": _COMMON,
    "syslog": _OF_SENDING | {"syslog-address", "syslog-facility", "syslog-format"},
    "journald": _OF_SENDING,
    "binary": _OF_SENDING,
}
# What others make of these before they get here.
_SUBJECT = frozenset({"tag", "labels", "labels-regex", "env", "env-regex"})
_SIZED, _CACHED = frozenset({"max-size", "max-file"}), frozenset({"cache-max-size", "cache-max-file"})
_ABOVE = {
    "json-file": _SUBJECT | _SIZED,
    "cri": _SIZED,
    "none": frozenset[str](),
    **dict.fromkeys(SENDING, _SUBJECT | _CACHED),
}
LOCAL_SYSLOG = "unix:///dev/log"
SYSLOG_PORT = 514
REACHED_S = 3.0
MAX_BUFFER_BYTES = 64 << 20
_SHORT_ID = 12
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"([0-9]+)\s*([bkmg]?)b?")
# What the shim says of each line, and no label may.
_OF_ENTRIES = ("MESSAGE", "PRIORITY", "SYSLOG_TIMESTAMP", "CONTAINER_PARTIAL")
_NO_FIELD = re.compile(r"[^A-Z0-9_]")


def check_options(options: LogOptions) -> str:
    """The driver's name. Raises InvalidArgument, Unimplemented for an option that it does not have."""
    driver = DRIVERS.get(options.driver)
    if driver is None:
        raise InvalidArgument(f"log.driver: {options.driver} is no driver of this version", reason="BAD_LOG")
    known = _KNOWN[driver]
    if unknown := sorted(name for name in options.options if name not in known):
        if unknown[0].startswith("syslog-tls"):
            raise Unimplemented("syslog over TLS is not there yet: send to a server of this host", reason="NOT_YET")
        every = ", ".join(sorted(known | _ABOVE[driver]))
        raise InvalidArgument(
            f"the log driver {driver} has no option {unknown[0]!r}: it knows {every}", reason="BAD_LOG"
        )
    if options.options.get("mode", "non-blocking") != "non-blocking":
        raise InvalidArgument(
            f"log mode {options.options['mode']!r} is not there: no container of corral waits for its log, what nobody"
            " takes is dropped and counted; leave the option out, or give non-blocking",
            reason="BAD_LOG",
        )
    if options.program and driver != "binary":
        raise InvalidArgument(f"the log driver {driver} runs no program: give binary:///path", reason="BAD_LOG")
    if options.options.get("cache-disabled", "false") not in ("true", "false"):
        raise InvalidArgument("log option cache-disabled must be true or false", reason="BAD_LOG")
    return driver


def fields(options: LogOptions, driver: str, config: TasksConfig, key: TaskKey) -> dict[str, object]:
    """What of the shim's "log" depends on the driver, which check_options() has named; a host's name is still to be
    resolved, see reached(). Raises InvalidArgument.
    """
    found: dict[str, object] = {}
    if size := options.options.get("max-buffer-size", ""):
        found["buffer_size"] = _size(size)
    match driver:
        case "json-file":
            attrs = dict(options.subject.attributes)
            found["attrs"] = attrs | ({"tag": options.subject.tag} if options.subject.tag else {})
        case "syslog":
            found["to"] = _syslog(options, key)
        case "journald":
            found["to"] = {"socket": str(config.journal_socket), "fields": _journal_fields(options.subject, key)}
        case "binary":
            env = {"CONTAINER_ID": key.id, "CONTAINER_NAMESPACE": key.namespace}
            found["to"] = {"args": program(options.program), "env": env}
    return found


def is_cached(options: LogOptions) -> bool:
    """Whether a driver that sends keeps a file, too."""
    return options.options.get("cache-disabled") != "true"


def _tag(subject: LogSubject, key: TaskKey) -> str:
    return subject.tag or key.id[:_SHORT_ID]


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or not int(match[1]):
        raise InvalidArgument(f"max-buffer-size {text!r} is no size: give 1m, say", reason="BAD_LOG")
    if (size := int(match[1]) * _UNITS[match[2]]) > MAX_BUFFER_BYTES:
        raise InvalidArgument(
            f"max-buffer-size {text!r} is too much memory for one log: give 64m or less", reason="BAD_LOG"
        )
    return size


# syslog


def _syslog(options: LogOptions, key: TaskKey) -> dict[str, object]:
    given = options.options
    form = given.get("syslog-format", "")
    if form not in FORMATS:
        known = ", ".join(filter(None, FORMATS))
        raise InvalidArgument(f"syslog-format {form!r} is not known: give one of {known}", reason="BAD_LOG")
    address = _address(given.get("syslog-address") or LOCAL_SYSLOG)
    if not form and not str(address["kind"]).startswith("unix"):
        form = "rfc3164"  # whoever is elsewhere wants to know from which host it comes
    tag = _tag(options.subject, key)
    if not tag.isprintable() or " " in tag:
        raise InvalidArgument(f"the log tag {tag!r} has a space or a control character in it", reason="BAD_LOG")
    return {
        **address,
        "facility": _facility(given.get("syslog-facility") or "daemon"),
        "form": form,
        "tag": tag,
        "hostname": socket.gethostname() or "-",
    }


def _facility(text: str) -> int:
    if text in FACILITIES:
        return FACILITIES.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(FACILITIES):
        return int(text)
    raise InvalidArgument(
        f"syslog-facility {text!r} is not known: give a number below {len(FACILITIES)}, or one of"
        f" {', '.join(FACILITIES)}",
        reason="BAD_LOG",
    )


def _address(text: str) -> dict[str, object]:
    wrong = InvalidArgument(
        f"syslog-address {text!r} is not understood: give unix:///dev/log, unixgram:///path, udp://host:514 or"
        " tcp://host:514",
        reason="BAD_LOG",
    )
    try:
        url = urlsplit(text)
        port = url.port or SYSLOG_PORT
    except ValueError:
        raise wrong from None
    if url.scheme == "tcp+tls":
        raise Unimplemented("syslog over TLS is not there yet: send to a server of this host", reason="NOT_YET")
    if url.scheme not in KINDS or url.query or url.fragment or url.username:
        raise wrong
    if url.scheme.startswith("unix"):
        if url.netloc or not url.path.startswith("/") or url.path == "/":
            raise wrong
        return {"kind": url.scheme, "path": url.path}
    if not url.hostname or url.path.strip("/"):
        raise wrong
    return {"kind": url.scheme, "host": url.hostname, "port": port}


async def reached(log: Mapping[str, object]) -> dict[str, object]:
    """`log` with the address of a syslog server instead of its name; one that takes connections takes one.

    Shims ask no name server and wait for nobody. Raises FailedPrecondition.
    """
    to = log.get("to")
    if not isinstance(to, dict) or not to.get("host"):
        return dict(log)
    kind = socket.SOCK_STREAM if to["kind"] == "tcp" else socket.SOCK_DGRAM
    what = f"the syslog server {to['kind']}://{to['host']}:{to['port']}"
    try:
        async with asyncio.timeout(REACHED_S):
            found = await asyncio.get_running_loop().getaddrinfo(str(to["host"]), to["port"], type=kind)
            host = str(found[0][4][0])
            if to["kind"] == "tcp":
                _, writer = await asyncio.open_connection(host, to["port"])
                writer.close()
    except TimeoutError as e:
        raise FailedPrecondition(f"{what} did not answer within {REACHED_S:g} s", reason="NO_LOG_SERVER") from e
    except OSError as e:
        raise FailedPrecondition(f"{what} cannot be reached: {e.strerror or e}", reason="NO_LOG_SERVER") from e
    return {**log, "to": {**to, "host": host}}


# journald


def _journal_fields(subject: LogSubject, key: TaskKey) -> dict[str, str]:
    """As docker's driver names them."""
    tag = _tag(subject, key)
    given = {_field_name(name): value for name, value in subject.attributes.items()}
    own = {
        "CONTAINER_ID": key.id[:_SHORT_ID],
        "CONTAINER_ID_FULL": key.id,
        "CONTAINER_NAME": subject.name,
        "CONTAINER_TAG": tag,
        "IMAGE_NAME": subject.image,
        "SYSLOG_IDENTIFIER": tag,
    }
    return {name: value for name, value in (given | own).items() if name and not name.startswith(_OF_ENTRIES)}


def _field_name(name: str) -> str:
    """What the journal takes: capitals, digits and underscores, not one of these two first."""
    return _NO_FIELD.sub("_", name.upper()).lstrip("_0123456789")[:64]


# binary


def program(uri: str) -> list[str]:
    """The program and its arguments: each key of the query, followed by its value if it has one.

    Raises InvalidArgument if it is not the absolute path of a program. Source: containerd, NewBinaryCmd.
    """
    url = _split(uri)
    path = unquote(url.path)
    if url.scheme != "binary" or url.netloc or not path.startswith("/") or "\0" in path:
        raise InvalidArgument(
            f"the logging program {uri!r} is not understood: give binary:///path/of/program?argument=value",
            reason="BAD_LOG",
        )
    if ".." in PurePosixPath(path).parts:
        raise InvalidArgument(f"the logging program {path} is named with '..': give its path", reason="BAD_LOG")
    if not Path(path).is_file() or not os.access(path, os.X_OK):
        raise InvalidArgument(f"the logging program {path} is no program of this host", reason="BAD_LOG")
    args = [path]
    for key, value in parse_qsl(url.query, keep_blank_values=True):
        args += [key, value] if value else [key]
    if any("\0" in arg for arg in args):
        raise InvalidArgument("an argument of the logging program contains a NUL character", reason="BAD_LOG")
    return args


def _split(uri: str) -> SplitResult:
    try:
        return urlsplit(uri)
    except ValueError:
        return SplitResult("", "", "", "", "")
