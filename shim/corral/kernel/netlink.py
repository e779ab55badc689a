"""Netlink sockets: requests in batches, each acknowledged, and dumps.

    request   | length type flags sequence port | body: a fixed header, then attributes |
    attribute | length type | payload, padded to 4 |
    answer    NLMSG_ERROR with 0 or -errno per request, or for a dump any number of messages and NLMSG_DONE

A batch is one send; the kernel works through it in order before send returns. Source: netlink(7), linux/netlink.h.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_EXCL, NLM_F_CREATE, NLM_F_DUMP = 0x200, 0x400, 0x300

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_NLA_F_NESTED, _NLA_TYPE_MASK = 0x8000, 0x3FFF
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")
_BUFFER_BYTES = 1 << 16
# Acknowledgements of more might not fit into the socket's buffer.
_BATCH = 64
# A dump that the kernel marks as torn by a change is asked for again.
_DUMP_ATTEMPTS = 5

type Attributes = Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class Message:
    """One request. `what` says in words what it asks for, for the error."""

    kind: int
    body: bytes
    what: str
    flags: int = 0


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes) -> Attributes:
    """The attributes in data by kind; of several of one kind, the last."""
    found = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _NLA_TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)
    return found


class Socket:
    """A netlink socket of one family, in the namespace that its thread is in now. For one thread at a time."""

    def __init__(self, family: int) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._sequence = 0
        try:
            self._socket.bind((0, 0))
            # Short acknowledgements, and the kernel's own words with an error.
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        except BaseException:
            self._socket.close()
            raise

    def request(self, *messages: Message) -> None:
        """Ask for all of them, in order; they are done when this returns.

        Raises OSError for the first that failed, naming it. The others are not undone, and those after it were tried.
        """
        failures = [
            failure
            for start in range(0, len(messages), _BATCH)
            for failure in self._batch(messages[start : start + _BATCH])
        ]
        if failures:
            raise failures[0]

    def _batch(self, messages: Sequence[Message]) -> list[OSError]:
        """Send some and read their acknowledgements; the failures, in order."""
        first = self._send(messages, NLM_F_ACK)
        outcomes: dict[int, OSError | None] = {}
        while len(outcomes) < len(messages):
            for kind, flags, sequence, payload in self._receive():
                number = sequence - first
                if kind == _NLMSG_ERROR and 0 <= number < len(messages):  # else to a request nobody waits for any more
                    outcomes[number] = _failure(payload, flags, messages[number].what)
        return [failure for _, failure in sorted(outcomes.items()) if failure is not None]

    def dump(self, message: Message) -> Sequence[bytes]:
        """Bodies of all messages that answer a request for a list. Raises OSError."""
        for _ in range(_DUMP_ATTEMPTS):
            found, torn = self._dump(message)
            if not torn:
                return found
        raise OSError(errno.EAGAIN, f"netlink: {message.what}: it changes too fast to be read")

    def _dump(self, message: Message) -> tuple[list[bytes], bool]:
        wanted = self._send([message], NLM_F_DUMP)
        found: list[bytes] = []
        torn = False
        while True:
            for kind, flags, sequence, payload in self._receive():
                if sequence != wanted:
                    continue
                torn |= bool(flags & NLM_F_DUMP_INTR)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    if (failure := _failure(payload, flags, message.what)) is not None:
                        raise failure
                    return found, torn
                found.append(payload)

    def close(self) -> None:
        """Close the socket; harmless when repeated."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _send(self, messages: Sequence[Message], flags: int) -> int:
        """Send the batch; returns the sequence number of its first message."""
        first = self._sequence + 1
        parts = []
        for message in messages:
            self._sequence += 1
            body = message.body
            header = (
                _HEADER.size + len(body),
                message.kind,
                NLM_F_REQUEST | flags | message.flags,
                self._sequence,
                0,
            )
            parts += [_HEADER.pack(*header), body, bytes(-len(body) % 4)]
        self._socket.send(b"".join(parts))
        return first

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """The messages of one datagram: kind, flags, sequence number, payload."""
        data = self._socket.recv(_BUFFER_BYTES)
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            if length < _HEADER.size:
                return
            yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
            offset += _aligned(length)


def _failure(payload: bytes, flags: int, what: str) -> OSError | None:
    """What an NLMSG_ERROR or NLMSG_DONE says; None if all went well."""
    (negative,) = _ERRNO.unpack_from(payload) if len(payload) >= _ERRNO.size else (0,)
    if negative >= 0:
        return None
    code = -negative
    words = os.strerror(code)
    if reason := _reason(payload, flags):
        words = f"{words} ({reason})"
    return OSError(code, f"netlink: {what}: {words}")


def _reason(payload: bytes, flags: int) -> str:
    """The kernel's own words, where it gave some: after the error number and the (capped) request."""
    if not flags & _NLM_F_ACK_TLVS:
        return ""
    request = _HEADER.size
    if not flags & _NLM_F_CAPPED:
        with contextlib.suppress(struct.error):
            request = _aligned(_HEADER.unpack_from(payload, _ERRNO.size)[0])
    text = attributes(payload[_ERRNO.size + request :]).get(_NLMSGERR_ATTR_MSG, b"")
    return text.rstrip(b"\0").decode("utf-8", "replace")


def _aligned(length: int) -> int:
    return (length + 3) & ~3
