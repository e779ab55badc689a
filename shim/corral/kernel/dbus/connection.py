"""A connection to a message bus, or directly to a service: one caller, who waits.

    client                                  server
    NUL, "AUTH EXTERNAL", "DATA", "BEGIN"                     all at once, as sd-bus does
                                            "DATA", "OK <id>"
    METHOD_CALL (serial)                    METHOD_RETURN or ERROR (reply_serial), and SIGNALs at any time

Who the client is, the kernel tells the server. Naming no identity leaves it at that, which holds in a user namespace
too, where a process does not know the uid that it has outside.

Source: D-Bus Specification "Authentication Protocol", "Server Addresses", "Message Bus Messages".
"""

import _socket as socket  # the part in C, which has all that is used here and takes a tenth of the time to load
import errno
import os
import struct
import time
from collections.abc import Callable
from typing import Any, Self

from corral.kernel.dbus import marshalling
from corral.kernel.dbus.marshalling import ERROR, METHOD_CALL, METHOD_RETURN, SIGNAL, Message

_AUTHENTICATION = b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n"
_LONGEST_LINE = 16384
_CHUNK = 65536
_TIMEVAL = struct.Struct("@ll")


class CallFailed(OSError):
    """What a service answers instead of a result."""

    def __init__(self, member: str, name: str, text: str) -> None:
        super().__init__(errno.EREMOTEIO, f"{member}: {text or name}")
        self.name = name
        """Of the error, "org.freedesktop.DBus.Error.AccessDenied"."""


class Target:
    """An interface of an object of a service."""

    __slots__ = ("interface", "path", "service")

    def __init__(self, service: str, path: str, interface: str) -> None:
        self.service, self.path, self.interface = service, path, interface


BUS = Target("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")


class Connection:
    """An authenticated connection. Raises OSError: ETIMEDOUT if an answer takes longer than timeout_s, EPROTO for one
    that is none, ECONNRESET if the other side ends it.
    """

    def __init__(self, path: str, *, timeout_s: float = 30.0, until: float = float("inf")) -> None:
        """Connect to a socket: a path, or with a NUL in front an abstract name.

        until: when all answers must be there, by the monotonic clock.
        """
        self._path = path.replace("\0", "@", 1)
        self._timeout_s, self._until = timeout_s, until
        self._received = bytearray()
        self._signals: list[Message] = []
        self._serial = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(path)
            self._authenticate()
        except OSError as e:
            self.close()
            raise OSError(e.errno, e.strerror, self._path) from e

    @classmethod
    def to_bus(cls, addresses: str, *, timeout_s: float = 30.0, until: float = float("inf")) -> Self:
        """Connect to the first bus of a list of addresses that there is, and introduce oneself."""
        error = OSError(errno.EAFNOSUPPORT, "no address of a unix socket", addresses)
        for path in unix_paths(addresses):
            try:
                connection = cls(path, timeout_s=timeout_s, until=until)
            except OSError as e:
                error = e
                continue
            try:
                connection.call(BUS, "Hello")
            except BaseException:
                connection.close()
                raise
            return connection
        raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def call(self, target: Target, member: str, signature: str = "", *arguments: object) -> tuple[Any, ...]:
        """Call a method and wait for what it returns. Raises CallFailed with the error that it answers."""
        self._serial += 1
        call = Message(
            METHOD_CALL,
            self._serial,
            path=target.path,
            interface=target.interface,
            member=member,
            destination=target.service,
            signature=signature,
            body=arguments,
        )
        deadline = self._deadline()
        self._send(marshalling.encode(call), deadline)
        while True:
            answer = self._receive(deadline)
            if answer.kind == SIGNAL:
                self._signals.append(answer)
            elif answer.reply_serial == self._serial and answer.kind == METHOD_RETURN:
                return answer.body
            elif answer.reply_serial == self._serial and answer.kind == ERROR:
                text = answer.body[0] if answer.signature[:1] == "s" else ""
                raise CallFailed(member, answer.error_name, text)

    def wait_for_signal(
        self, interface: str, member: str, matches: Callable[[tuple[Any, ...]], bool]
    ) -> tuple[Any, ...]:
        """The body of the first signal that matches, of those that came since the connection was made."""
        deadline = self._deadline()
        while True:
            message = self._signals.pop(0) if self._signals else self._receive(deadline)
            wanted = message.kind == SIGNAL and (message.interface, message.member) == (interface, member)
            if wanted and matches(message.body):
                return message.body

    def _connect(self, path: str) -> None:
        """Where a service has stopped, it waits for room in its backlog: without a limit for ever, while a socket
        that does not block is refused at once, though there may be room in a moment."""
        seconds, microseconds = divmod(max(1, round(self._timeout_s * 1_000_000)), 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(seconds, microseconds))
        try:
            self._socket.connect(path)
        except BlockingIOError:
            raise self._late() from None

    def _authenticate(self) -> None:
        deadline = self._deadline()
        self._send(_AUTHENTICATION, deadline)
        for expected in (b"DATA", b"OK"):
            line = self._line(deadline)
            if line.split(b" ")[0] != expected:
                raise OSError(errno.EACCES, f"the service does not let us in: {line.decode('ascii', 'replace')}")

    def _line(self, deadline: float) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            if len(self._received) > _LONGEST_LINE:
                raise OSError(errno.EPROTO, "a line of the authentication that does not end")
            self._fill(deadline)
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        return line

    def _receive(self, deadline: float) -> Message:
        try:
            while len(self._received) < (length := marshalling.length_of(self._received)):
                self._fill(deadline)
            data = bytes(self._received[:length])
            del self._received[:length]
            return marshalling.decode(data)
        except ValueError as e:
            raise OSError(errno.EPROTO, str(e), self._path) from e

    def _fill(self, deadline: float) -> None:
        self._limit(deadline)
        try:
            data = self._socket.recv(_CHUNK)
        except TimeoutError:
            raise self._late() from None
        if not data:
            raise OSError(errno.ECONNRESET, "the service has ended the connection", self._path)
        self._received += data

    def _send(self, data: bytes, deadline: float) -> None:
        self._limit(deadline)
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise self._late() from None

    def _deadline(self) -> float:
        return min(time.monotonic() + self._timeout_s, self._until)

    def _limit(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        self._socket.settimeout(left)

    def _late(self) -> OSError:
        return OSError(errno.ETIMEDOUT, f"no answer within {self._timeout_s:g} s", self._path)


def unix_paths(addresses: str) -> list[str]:
    r"""The sockets, as connect(2) takes them, of a list of addresses; those of other transports are left out.

    >>> unix_paths("tcp:host=there;unix:path=/run/a%20bus,guid=1;unix:abstract=bus")
    ['/run/a bus', '\x00bus']
    """
    found = []
    for address in addresses.split(";"):
        transport, _, rest = address.partition(":")
        pairs = dict([pair.partition("=")[::2] for pair in rest.split(",")])
        if transport == "unix" and "path" in pairs:
            found.append(_unescaped(pairs["path"]))
        elif transport == "unix" and "abstract" in pairs:
            found.append("\0" + _unescaped(pairs["abstract"]))
    return found


def _unescaped(value: str) -> str:
    """Every percent sign begins an escape of two hexadecimal digits."""
    head, *rest = value.split("%")
    try:
        return os.fsdecode(head.encode() + b"".join(bytes.fromhex(part[:2]) + part[2:].encode() for part in rest))
    except ValueError:
        raise OSError(errno.EINVAL, "an address that is none", value) from None
