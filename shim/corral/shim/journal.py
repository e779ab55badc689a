"""Messages for systemd's journal, in its native protocol: one datagram an entry.

    NAME=value LF                        if the value has no newline
    NAME LF size (64 bits, LE) value LF  in any case

An entry that is larger than a datagram may be comes in a sealed memfd. Source: systemd, "Native Journal Protocol".
"""

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Mapping

from corral.shim.logs import timestamp
from corral.shim.outbox import Refused
from corral.shim.sending import Piece
from corral.shim.spool import StreamName

_PRIORITIES = {"stdout": b"6", "stderr": b"3"}
_SIZE = struct.Struct("<Q")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def field(name: str, value: bytes) -> bytes:
    """One field of an entry."""
    if b"\n" in value:
        return name.encode() + b"\n" + _SIZE.pack(len(value)) + value + b"\n"
    return name.encode() + b"=" + value + b"\n"


class JournalFraming:
    """Entries with what docker tells of a container."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, str]) -> None:
        """fields: of every entry."""
        self._fields = b"".join(field(name, value.encode("utf-8", "replace")) for name, value in fields.items())

    def message(self, stream: StreamName, text: bytes, time_ns: int, piece: Piece | None) -> bytes:
        """One entry."""
        entry = field("MESSAGE", text) + b"PRIORITY=" + _PRIORITIES[stream] + b"\n"
        entry += f"SYSLOG_TIMESTAMP={timestamp(time_ns)}\n".encode() + self._fields
        if piece is not None:
            entry += f"CONTAINER_PARTIAL_ID={piece.line}\nCONTAINER_PARTIAL_ORDINAL={piece.number}\n".encode()
            entry += f"CONTAINER_PARTIAL_LAST={str(piece.last).lower()}\n".encode()
            if not piece.last:
                entry += b"CONTAINER_PARTIAL_MESSAGE=true\n"
        return entry


class JournalReceiver:
    """The journal's socket; a journal that was started again is found again."""

    returns, hears = True, False

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Raises OSError."""
        self.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        self._socket = sock

    def fileno(self) -> int:
        """-1 while there is no connection."""
        return self._socket.fileno() if self._socket is not None else -1

    def send(self, message: bytes) -> int:
        """As Receiver."""
        assert self._socket is not None
        try:
            return self._socket.send(message)
        except OSError as e:
            if e.errno == errno.ENOBUFS:
                raise BlockingIOError(e.errno, e.strerror) from e
            if e.errno != errno.EMSGSIZE:
                raise
        self._send_sealed(message)
        return len(message)

    def _send_sealed(self, message: bytes) -> None:
        assert self._socket is not None
        fd = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            if os.write(fd, message) < len(message):
                raise Refused
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
            self._socket.sendmsg([b""], [rights])
        finally:
            os.close(fd)

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
