"""Where a service listens: `unix:///PATH` or `tcp://HOST:PORT`.

Every run of the command loads this. So these are named tuples, which are made in an eighth of a dataclass's time, and
what a plain `unix:///PATH` does without is imported where it is used, or looked at no earlier: the command loads
neither gRPC's library nor errors before somebody does.
"""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from corral.rpc import errors

if TYPE_CHECKING:
    from pathlib import Path

MAX_MESSAGE_BYTES = 16 << 20

# Of every channel, whoever opens it.
OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # an http_proxy variable must not redirect local calls
    ("grpc.default_authority", "localhost"),  # else a unix path becomes an authority that Go servers refuse
    # A daemon that restarts is back within a second; gRPC's own default waits for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # In spite of its name this is how long one attempt to connect may take. A daemon that executes itself anew answers
    # those who have connected meanwhile, but on a busy machine it takes its time.
    ("grpc.min_reconnect_backoff_ms", 60_000),
)

# sockaddr_un.sun_path is 108 bytes with its NUL. Source: unix(7).
MAX_SOCKET_PATH = 107
# An address as nearly all are: nothing in it has a meaning of its own in a URL.
_PLAIN = re.compile(r"unix:///[A-Za-z0-9._/+-]*")


class Tls(NamedTuple):
    """Mutual TLS: both sides show a certificate that `ca` signed. PEM files."""

    cert: "Path"
    key: "Path"
    ca: "Path"

    def server_credentials(self) -> "grpc.ServerCredentials":
        """Raises OSError if a file cannot be read."""
        pair = (self.key.read_bytes(), self.cert.read_bytes())
        return grpc.ssl_server_credentials([pair], self.ca.read_bytes(), require_client_auth=True)

    def channel_credentials(self) -> "grpc.ChannelCredentials":
        """Raises OSError if a file cannot be read."""
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes())


class UnixAddress(NamedTuple):
    """A socket in the file system."""

    path: "Path"

    def __str__(self) -> str:
        return f"unix://{self.path}"


class TcpAddress(NamedTuple):
    """A host, by name or literal address, and a port; port 0 lets the kernel choose one when listening."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        import ipaddress

        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


type Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Raises InvalidArgument, with both forms shown."""
    from pathlib import Path

    if _PLAIN.fullmatch(text):
        return UnixAddress(Path(text.removeprefix("unix://")))
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
        if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
            return UnixAddress(Path(parts.path))
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None and parts.path in ("", "/"):
            return TcpAddress(parts.hostname, parts.port)
    except ValueError:
        pass  # a port that is no number
    raise errors.InvalidArgument(
        f"{text!r} is not an address: use unix:///PATH or tcp://HOST:PORT", reason="BAD_ADDRESS"
    )


def beside(path: str) -> str:
    """Where calls with one answer are served beside the unix socket of that path, see corral.rpc.brief."""
    return f"{path}.brief"


class Target:
    """An address in the form that gRPC takes; keeps open what that form needs until close()."""

    def __init__(self, address: Address | str) -> None:
        """Raises InvalidArgument for a malformed text, Unavailable if the directory of a socket with a long path does
        not exist."""
        self._directory = -1
        if isinstance(address, str) and not _PLAIN.fullmatch(address):
            address = parse_address(address)
        self.is_local = not isinstance(address, TcpAddress)
        text = str(address)
        self.name = (
            f"unix:{self._short(text.removeprefix('unix://'))}" if self.is_local else text.removeprefix("tcp://")
        )

    def _short(self, path: str) -> str:
        """The same socket by way of its directory's descriptor: the kernel limits the string, not the path."""
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        directory, name = os.path.split(path)
        try:
            self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise errors.Unavailable(f"cannot reach unix://{path}: {e.strerror}", reason="UNREACHABLE") from e
        return f"/proc/self/fd/{self._directory}/{name}"

    def close(self) -> None:
        """Harmless when repeated."""
        directory, self._directory = self._directory, -1
        if directory >= 0:
            os.close(directory)
