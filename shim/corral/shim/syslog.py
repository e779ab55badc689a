"""Messages for a syslog server: RFC 3164, RFC 5424 or the short form of /dev/log, over a socket of any kind.

    unix form   <30>Jan  2 15:04:05 TAG[PID]: text
    rfc3164     <30>Jan  2 15:04:05 HOST TAG[PID]: text
    rfc5424     <30>1 2026-01-02T15:04:05.123456+00:00 HOST TAG PID TAG - text

Each ends with a newline, which streams are cut by (RFC 6587, 3.4.2), and which datagrams may have.
"""

import errno
import os
import socket
import time
from dataclasses import dataclass

from corral.shim.outbox import Refused
from corral.shim.sending import Piece
from corral.shim.spool import StreamName

FACILITIES = (
    *("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"),
    *("ntp", "audit", "alert", "clock"),
    *(f"local{n}" for n in range(8)),
)
FORMATS = ("", "rfc3164", "rfc5424", "rfc5424micro")
KINDS = ("unix", "unixgram", "udp", "tcp")
_SEVERITIES = {"stdout": 6, "stderr": 3}
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a path, or a numeric address with a port."""

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"{self.kind}://{self.path or f'{self.host}:{self.port}'}"


@dataclass(frozen=True, slots=True)
class SyslogFraming:
    """What is told with each line."""

    facility: int
    form: str
    tag: str
    hostname: str

    def message(self, stream: StreamName, text: bytes, time_ns: int, piece: Piece | None) -> bytes:
        """Of one line; that it is but a piece, syslog can't tell."""
        priority = self.facility << 3 | _SEVERITIES[stream]
        return f"<{priority}>{self._header(time_ns)}".encode() + text + b"\n"

    def _header(self, time_ns: int) -> str:
        if self.form.startswith("rfc5424"):
            at = _rfc3339(time_ns, micro=self.form.endswith("micro"))
            return f"1 {at} {self.hostname} {self.tag} {os.getpid()} {self.tag} - "
        local = time.localtime(time_ns // 1_000_000_000)
        at = f"{_MONTHS[local.tm_mon - 1]} {local.tm_mday:2} {local.tm_hour:02}:{local.tm_min:02}:{local.tm_sec:02}"
        host = f"{self.hostname} " if self.form else ""
        return f"{at} {host}{self.tag}[{os.getpid()}]: "


def _rfc3339(time_ns: int, *, micro: bool) -> str:
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    local = time.localtime(seconds)
    sign, minutes = ("-" if local.tm_gmtoff < 0 else "+"), abs(local.tm_gmtoff) // 60
    zone = f"{sign}{minutes // 60:02}:{minutes % 60:02}" if local.tm_gmtoff else "Z"
    part = f".{nanoseconds // 1000:06}" if micro else ""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}{part}{zone}"


class SyslogReceiver:
    """A connection to a server; a lost one is made again."""

    returns = True

    def __init__(self, address: Address) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self.is_stream = self.hears = address.kind == "tcp"

    def connect(self) -> None:
        """Raises OSError; over TCP also a later send() may, as nobody waits for the server here."""
        self.close()
        self.is_stream = self.hears = self._address.kind == "tcp"
        self._socket = self._connected()

    def _connected(self) -> socket.socket:
        address = self._address
        match address.kind:
            case "unix":
                try:
                    return _unix(socket.SOCK_DGRAM, address.path)
                except OSError as e:
                    if e.errno != errno.EPROTOTYPE:
                        raise
                    self.is_stream = self.hears = True
                    return _unix(socket.SOCK_STREAM, address.path)
            case "unixgram":
                return _unix(socket.SOCK_DGRAM, address.path)
            case _:
                return _inet(address)

    def fileno(self) -> int:
        """-1 while there is no connection."""
        return self._socket.fileno() if self._socket is not None else -1

    def send(self, message: bytes) -> int:
        """As Receiver."""
        assert self._socket is not None
        try:
            return self._socket.send(message, socket.MSG_NOSIGNAL)
        except OSError as e:
            if e.errno == errno.EMSGSIZE:
                raise Refused from e
            if e.errno in (errno.ENOBUFS, errno.EINPROGRESS) or (e.errno == errno.ENOTCONN and self.is_stream):
                raise BlockingIOError(e.errno, e.strerror) from e  # a connection that is being made
            raise

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _unix(kind: socket.SocketKind, path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _inet(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    kind = socket.SOCK_STREAM if address.kind == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        code = sock.connect_ex((address.host, address.port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code), f"{address.host}:{address.port}")
    except BaseException:
        sock.close()
        raise
    return sock
