"""Rules of a chain that may be anybody's, read and changed by messages of nf_tables packed by hand.

libnftables ends the whole process where a rule of others names a link, a chain or a comment that is not UTF-8 and JSON
is asked for. Here names are bytes. A change names the generation of the ruleset that was read: where anybody has
changed anything since, the kernel refuses it with ERESTART, so that a handle never means another rule than the one
seen.

Source: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h, netlink(7).
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

IPV4, IPV6 = 2, 10  # NFPROTO_IPV4, NFPROTO_IPV6
DROP, ACCEPT = 0, 1  # NF_DROP, NF_ACCEPT
TIMEOUT_S = 5.0
_NETLINK_NETFILTER = 12
_NFTABLES = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_GET_CHAIN, _NEW_RULE, _GET_RULE, _DEL_RULE, _GET_GENERATION = 4, 6, 7, 8, 16
_REQUEST, _ACK, _DUMP, _CREATE, _APPEND = 0x1, 0x4, 0x300, 0x400, 0x800
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_FORWARD_HOOK = 2
_META_MARK = 3
_READ_BYTES = 1 << 17

_HEADER = struct.Struct("=IHHII")
_FAMILY = struct.Struct(">BBH")  # and the version, and the id of a subsystem
_ATTRIBUTE = struct.Struct("=HH")
_BE32, _BE64, _HOST32 = struct.Struct(">I"), struct.Struct(">Q"), struct.Struct("=I")
_CODE = struct.Struct("=i")


@dataclass(frozen=True, slots=True)
class Rule:
    """What is told here of one."""

    handle: int
    target: bytes = b""  # the chain that it jumps or goes to
    accepts_mark: int | None = None  # of packets that carry exactly that mark, all that it does is accept them


@dataclass(frozen=True, slots=True)
class Chain:
    """A base chain at the forward hook, as it was in a generation of the ruleset."""

    generation: int
    policy: int
    rules: Sequence[Rule] = ()


class Nfnetlink:
    """A socket, opened when it is first needed in the network namespace of that thread; one caller at a time."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._sequence = 0

    def close(self) -> None:
        """Harmless when repeated."""
        made, self._socket = self._socket, None
        if made is not None:
            made.close()

    def chain(self, family: int, table: str, name: str) -> Chain | None:
        """None if there is none of that name at the forward hook. Raises OSError."""
        [generation] = self._ask(_GET_GENERATION, 0)
        where = _words(1, table) + _words(3, name)
        try:
            [found] = self._ask(_GET_CHAIN, family, where)
        except FileNotFoundError:
            return None
        told = dict(attributes(found))
        if 4 not in told or dict(attributes(told[4])).get(1) != _BE32.pack(_FORWARD_HOOK):
            return None
        rules = self._ask(_GET_RULE, family, _words(1, table) + _words(2, name), dump=True)
        ours = [one for one in map(dict, map(attributes, rules)) if one.get(2) == name.encode() + b"\0"]
        number = _BE32.unpack(dict(attributes(generation))[1])[0]
        return Chain(number, _BE32.unpack(told[5])[0], [_rule(one) for one in ours])

    def replace(self, family: int, table: str, name: str, found: Chain, old: Sequence[Rule], mark: int | None) -> None:
        """Delete rules of a chain, and have its last one accept packets of a mark, if one is given; all or nothing.

        Raises OSError(ERESTART): the ruleset is not any more what it was found to be.
        """
        where = _words(1, table) + _words(2, name)
        begin = _family(0, _NFTABLES) + _attribute(1, _BE32.pack(found.generation))
        changes = [(_DEL_RULE, 0, where + _attribute(3, _BE64.pack(one.handle))) for one in old]
        if mark is not None:
            changes.append((_NEW_RULE, _CREATE | _APPEND, where + _attribute(4 | _NESTED, _accepting(mark))))
        first = self._sequence + 1
        data = self._message(_BATCH_BEGIN, _REQUEST, begin)
        for kind, flags, body in changes:
            data += self._message(_NFTABLES << 8 | kind, _REQUEST | _ACK | flags, _family(family) + body)
        last = self._sequence
        data += self._message(_BATCH_END, _REQUEST, _family(0, _NFTABLES))
        self._open().sendall(data)
        for _, sequence, _ in self._answers(first, last):
            if sequence == last:
                return

    def _ask(self, kind: int, family: int, body: bytes = b"", *, dump: bool = False) -> list[bytes]:
        flags = _REQUEST | (_DUMP if dump else 0)
        data = self._message(_NFTABLES << 8 | kind, flags, _family(family) + body)
        self._open().sendall(data)
        found = []
        for answer, _, told in self._answers(self._sequence, self._sequence):
            if answer == _DONE:
                break
            found.append(told[_FAMILY.size :])
            if not dump:
                break
        return found

    def _answers(self, first: int, last: int) -> Iterator[tuple[int, int, bytes]]:
        """Kind, sequence number and body of what is said to these requests, for ever. Raises OSError for an error."""
        made = self._open()
        while True:
            for kind, sequence, body in messages(made.recv(_READ_BYTES)):
                if not first <= sequence <= last:
                    continue  # of a request that failed before
                if kind in (_ERROR, _DONE) and (code := -_CODE.unpack_from(body)[0]):
                    raise OSError(code, f"nf_tables: {os.strerror(code)}")
                yield kind, sequence, body

    def _message(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body

    def _open(self) -> socket.socket:
        if self._socket is None:
            made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
            made.settimeout(TIMEOUT_S)
            self._socket = made
        return self._socket


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, sequence number and body of each. Pure."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        yield kind, sequence, data[at + _HEADER.size : at + length]
        at += (max(length, _HEADER.size) + 3) & ~3


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and value of each. Pure."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & 0x3FFF, data[at + _ATTRIBUTE.size : at + length]
        at += (max(length, _ATTRIBUTE.size) + 3) & ~3


def _rule(told: dict[int, bytes]) -> Rule:
    parts = [dict(attributes(one)) for _, one in attributes(told.get(4, b""))]
    expressions = [(one.get(1, b"").rstrip(b"\0"), dict(attributes(one.get(2, b"")))) for one in parts]
    verdicts = [
        dict(attributes(verdict))
        for name, said in expressions
        if name == b"immediate" and (verdict := dict(attributes(said.get(2, b""))).get(2))
    ]
    target = next((verdict[2].rstrip(b"\0") for verdict in verdicts if 2 in verdict), b"")
    return Rule(_BE64.unpack(told[3])[0], target, _accepted_mark(expressions, verdicts))


def _accepted_mark(
    expressions: Sequence[tuple[bytes, dict[int, bytes]]], verdicts: Sequence[dict[int, bytes]]
) -> int | None:
    told = [(name, said) for name, said in expressions if name not in (b"counter", b"match")]
    if [name for name, _ in told] != [b"meta", b"cmp", b"immediate"] or len(verdicts) != 1:
        return None
    meta, compare = told[0][1], told[1][1]
    value = dict(attributes(compare.get(3, b""))).get(1, b"")
    is_mark = meta.get(2) == _BE32.pack(_META_MARK) and compare.get(2) == _BE32.pack(0) and len(value) == 4
    return _HOST32.unpack(value)[0] if is_mark and verdicts[0].get(1) == _BE32.pack(ACCEPT) else None


def _accepting(mark: int) -> bytes:
    """The expressions of a rule that iptables shows as `-m mark --mark … -j ACCEPT`."""
    register = _attribute(1, _BE32.pack(1))
    value = _attribute(3 | _NESTED, _attribute(1, _HOST32.pack(mark)))
    verdict = _attribute(2 | _NESTED, _attribute(1, _BE32.pack(ACCEPT)))
    return (
        _expression("meta", register + _attribute(2, _BE32.pack(_META_MARK)))
        + _expression("cmp", register + _attribute(2, _BE32.pack(0)) + value)
        + _expression("counter", b"")
        + _expression("immediate", _attribute(1, _BE32.pack(0)) + _attribute(2 | _NESTED, verdict))
    )


def _expression(name: str, said: bytes) -> bytes:
    return _attribute(1 | _NESTED, _words(1, name) + _attribute(2 | _NESTED, said))


def _family(family: int, subsystem: int = 0) -> bytes:
    return _FAMILY.pack(family, 0, subsystem)


def _words(kind: int, words: str) -> bytes:
    return _attribute(kind, words.encode() + b"\0")


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % 4)
